"""A drafter that runs a model of its own, one pass per level of a tree, with its state in the target's pages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from parlay.bets import Bet, Tree
from parlay.drafters.base import Drafter
from parlay.drafters.coverage import Coverage
from parlay.drafters.growing import Growth, draw_children
from parlay.engine.batch import Draft, ForwardBatch, PackedRow, join, pack_row
from parlay.engine.model import TargetModel
from parlay.types import Offer, Row, RowResult

MOST, LEAST = 512, 32  # missed tokens that are read in one step, whatever the step's budget has left


class LevelDrafter(Drafter):
    """Draws trees level by level.

    A row's first pass reads the known tokens that the drafter has not seen; its output guesses the first level. Every
    further pass runs the nodes that get children. After a spell of being off a row may have much to read, that is more
    than a step of its own guesses leaves: then it is read in parts, within what the step's known tokens left of the
    token budget, and the row gets no guesses until that is done.

    Args:
        tree: The largest tree.
        device: Where it computes.
        seed: Of its own randomness.
    """

    owns_kv = True
    ids: torch.Tensor | None = None  # [V] the target's tokens of its logits; None where they are all of them

    def __init__(self, tree: Tree, device: torch.device, seed: int = 0) -> None:
        self.tree, self.device = tree, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._shown: Mapping[int, Sequence[Offer]] = {}

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        self.page_size, self.eos = target.kv.page_size, target.eos
        self.coverage = Coverage(self.page_size)

    @abstractmethod
    def forward(self, batch: ForwardBatch, parents: Sequence[int] | None) -> torch.Tensor:
        """One pass.

        Args:
            batch: Known tokens in the first pass, nodes in the others.
            parents: In the passes after the first, per packed node the line of its parent among the logits of the pass
                before.

        Returns:
            [N, V] logits of what is read.
        """

    def reach(self, row: Row) -> int:
        """How many levels it can guess behind the row's last known token in this step; 0 for none."""
        return row.max_depth

    def read_from(self, row: Row) -> int:
        """The first known token that it still has to read."""
        first = min(self.coverage.of(row), row.length - 1)
        if self.window is None or row.length - first <= 2 * self.window:
            return first
        page = (row.length - self.window) // self.page_size
        self.coverage.leave_out(row, page)
        return page * self.page_size

    def note_read(self, row: Row, end: int, guesses: int = 0) -> None:
        """It has read tokens up to `end`, and written so many guesses behind all known ones."""
        self.coverage.wrote(row, end, guesses)

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """See `Drafter`."""
        offers: list[Offer | None] = []
        for row in rows:
            tree = self.tree.trim(len(self.tree), self.reach(row))
            unread = row.length - 1 - self.read_from(row) if tree else 0
            offers.append(Offer(self.name, tree, catch_up=unread) if tree else None)
        return offers

    def hear(self, shown: Mapping[int, Sequence[Offer]]) -> None:
        """See `Drafter`. Trees that are free take these guesses in."""
        self._shown = shown

    @torch.inference_mode()
    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        """See `Drafter`."""
        shown, self._shown = self._shown, {}
        growths, logits = self._read(rows, bets, budget, shown)
        growing = list(growths.values())
        while growing:
            lines = [(growth, node) for growth in growing for node in growth.frontier]
            draw_children(growing, logits, self.ids, self._generator, self.sampling)
            line_of = {(growth.row.seq, node): line for line, (growth, node) in enumerate(lines)}
            growing = [growth for growth in growing if growth.frontier]
            if growing:
                parents = [line_of[g.row.seq, g.parents[node]] for g in growing for node in g.frontier]
                packed = [growth.packed(self.page_size, self.coverage.first_page(growth.row)) for growth in growing]
                batch = join(packed, [True] * len(packed), self.device)
                logits = self.forward(batch, parents)
        for growth in growths.values():
            self.note_read(growth.row, growth.row.length, len(growth.ran))
        found = {seq: growth.draft(self.name, self.ids) for seq, growth in growths.items()}
        return [found.get(row.seq) for row in rows]

    def _read(
        self, rows: Sequence[Row], bets: Sequence[Bet], budget: int, shown: Mapping[int, Sequence[Offer]]
    ) -> tuple[dict[int, Growth], torch.Tensor]:
        """Reads known tokens, where there are few first.

        Returns:
            By number the rows that are through, and the logits [N, V] behind their last known tokens, in their order.
        """
        budget = min(MOST, max(LEAST, budget))
        packed: dict[int, tuple[Row, PackedRow]] = {}
        reach = {row.seq: self.reach(row) for row in rows}
        willing = [row for row in rows if reach[row.seq] > 0]
        for row in sorted(willing, key=lambda row: row.length - self.read_from(row)):
            first = self.read_from(row)
            end = row.length
            if end - first > self.tree.depth + 1:
                end = min(end, first + budget)
                budget -= end - first
            if end > first:
                page = self.coverage.first_page(row)
                skipped = page * self.page_size
                known, pages = row.tokens[first:end], row.pages[page:]
                packed[row.seq] = row, pack_row(known, end - skipped, pages, self.page_size, skipped=skipped)
        if not packed:
            return {}, torch.zeros(0)
        reading = [packed[row.seq] for row in rows if row.seq in packed]
        ends = [line.skipped + line.end for _, line in reading]
        through = [end == row.length for end, (row, _) in zip(ends, reading, strict=True)]
        batch = join([line for _, line in reading], through, self.device)
        logits = self.forward(batch, None)
        for end, (row, _) in zip(ends, reading, strict=True):
            self.note_read(row, end)
        done = {row.seq for (row, _), whole in zip(reading, through, strict=True) if whole}
        growths = {
            row.seq: Growth(
                row,
                replace(bet, tree=bet.tree.trim(len(bet.tree), reach[row.seq])),
                self.eos,
                shown.get(row.seq, ()),
            )
            for row, bet in zip(rows, bets, strict=True)
            if row.seq in done
        }
        return growths, logits

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """See `Drafter`. What was accepted is read again beside the next token, in the same pass."""
        del results, taps
        self.coverage.end_step(rows)

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self.coverage.forget(seq)
