"""Medusa: heads on the target's last hidden state, which guess all levels of a tree in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch

from parlay.bets import Bet, Tree
from parlay.drafters.base import Drafter
from parlay.drafters.growing import Growth, draw_children
from parlay.drafters.medusa_files import load_heads
from parlay.drafters.medusa_heads import MedusaHeads
from parlay.engine.batch import Draft, kept_places
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.products import pack_products
from parlay.types import Offer, Row, RowResult


class Medusa(Drafter):
    """Runs heads on the feature of the position before the last known token, kept by slot beside the target's KV.

    A feature is what the target's own head reads. Every verification leaves those of all positions that it runs,
    whoever guessed, so there is nothing to catch up with. All nodes of a level have children from one distribution.

    Args:
        heads: The weights.
        tree: The largest tree; what is deeper than there are heads is cut off.
        target: Whose features they read.
        seed: Of sampled guesses.
    """

    name = "medusa"

    def __init__(self, heads: MedusaHeads, tree: Tree, target: LoadedModel, seed: int = 0) -> None:
        pack_products(heads.to(target.device), target.dtype)
        self.heads = heads.to(target.dtype).eval()
        self.tree = tree.trim(len(tree), heads.shape.heads)
        self.taps = (len(target.shapes) + 1,)
        self.device = target.device
        every = torch.arange(target.config.vocab_size, device=target.device)
        self.ids = None if heads.ids.equal(every) else heads.ids
        self.bytes_per_position = heads.shape.hidden * target.dtype.itemsize
        self._generator = torch.Generator(target.device).manual_seed(seed)
        self._shown: Mapping[int, Sequence[Offer]] = {}

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`."""
        if source is None:
            raise ValueError(
                "drafter medusa: name heads with --drafter medusa=FOLDER_OR_ID, or make some with parlay train --kind "
                "medusa"
            )
        return cls(load_heads(source, target), tree, target)

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        self.page_size, self.eos = target.kv.page_size, target.eos
        self._target_kv = target.kv
        self._features = target.kv.keep_beside(self.heads.shape.hidden)

    def detach(self) -> None:
        """See `Drafter`."""
        self._target_kv.drop(self._features)

    def reach(self, row: Row) -> int:
        """How many levels it can guess in this step; none where the target was not yet at the position before."""
        is_there = row.length > 1 and row.start >= row.length - 1
        return min(row.max_depth, self.heads.shape.heads) if is_there else 0

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """See `Drafter`."""
        trees = [self.tree.trim(len(self.tree), self.reach(row)) for row in rows]
        return [Offer(self.name, tree) if tree else None for tree in trees]

    def hear(self, shown: Mapping[int, Sequence[Offer]]) -> None:
        """See `Drafter`. Trees that are free take these guesses in."""
        self._shown = shown

    @torch.inference_mode()
    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        """See `Drafter`. There is nothing to catch up with."""
        del budget
        shown, self._shown = self._shown, {}
        growths: list[Growth] = []
        for row, bet in zip(rows, bets, strict=True):
            if tree := bet.tree.trim(len(bet.tree), self.reach(row)):
                growths.append(Growth(row, replace(bet, tree=tree), self.eos, shown.get(row.seq, ())))
        if not growths:
            return [None] * len(rows)
        line_of = {growth.row.seq: line for line, growth in enumerate(growths)}
        levels = max(growth.planned.depth for growth in growths)
        growing = growths
        for logits in self.forward([growth.row for growth in growths], levels):
            lines = [line_of[growth.row.seq] for growth in growing for _ in growth.frontier]
            some = logits.index_select(0, torch.tensor(lines, device=self.device))
            draw_children(growing, some, self.ids, self._generator, self.sampling)
            growing = [growth for growth in growing if growth.frontier]
            if not growing:
                break
        found = {growth.row.seq: growth.draft(self.name, self.ids) for growth in growths}
        return [found.get(row.seq) for row in rows]

    def forward(self, rows: Sequence[Row], levels: int) -> torch.Tensor:
        """The heads' one pass in a step.

        Args:
            rows: Whose features are there.
            levels: How many tokens to guess for each.

        Returns:
            [levels, rows, V] logits of the tokens behind the last known one.
        """
        places = [(row, row.length - 2) for row in rows]
        slots = [row.pages[at // self.page_size] * self.page_size + at % self.page_size for row, at in places]
        return self.heads(self._features.index_select(0, torch.tensor(slots, device=self.device)), levels)

    @torch.inference_mode()
    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """Keeps the features of known tokens and of accepted guesses, where their KV is by now."""
        lines, slots = kept_places(rows, results, self.page_size)
        chosen = taps[self.taps[0]].index_select(0, torch.tensor(lines, device=self.device))
        self._features.index_copy_(0, torch.tensor(slots, device=self.device), chosen)
