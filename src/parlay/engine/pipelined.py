"""Predictive pipelined decoding: another compute unit begins the next token before it is known.

After Yang et al. 2023 (arXiv 2307.05908, algorithm 1). Once the target has a token's state after an exit layer, the
other unit takes the k most likely next tokens by that state and runs their first layers, all k in one pass, while the
target finishes. If the token turns out to be one of them, it begins where they have come to: its KV rows are moved to
their place and its hidden state is taken over. If not, nothing is lost but the unit's work. Only what the target's last
layer says is ever emitted.

The unit reads the exit head as well, so that the target loses no time for it. It runs no layer beyond the exit layer
before the target has finished, so what it attends to is always there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from parlay.bets import Tree
from parlay.engine import native
from parlay.engine.accept import Scores
from parlay.engine.attention import forward_batch
from parlay.engine.batch import ForwardBatch, join, pack, pack_row
from parlay.engine.compute_unit import Unit, seconds_between
from parlay.engine.sampling import argmax
from parlay.types import Row

if TYPE_CHECKING:
    from parlay.engine.model import TargetModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class HeadStart:
    """What is done of a row's next token.

    Attributes:
        token: If it is this one,
        position: at this place of the row's text.
        slot: Its KV, of the layers that are done.
        layers: So many are done.
        hidden: [hidden] after them.
        taps: By layer, [hidden] after those of them that somebody wants.
    """

    token: int
    position: int
    slot: int
    layers: int
    hidden: torch.Tensor
    taps: Mapping[int, torch.Tensor]


@dataclass(slots=True)
class Tally:
    """What came of it so far.

    Attributes:
        forks: Tokens for which candidates were begun.
        matches: Of which one was the next token.
        layers: That tokens began with, in all.
        reached: Layers that the unit had done when tokens were known, in all.
        seconds: By part: `exit` until the exit layer, `rest` until the logits, `handoff` from there on.
    """

    forks: int = 0
    matches: int = 0
    layers: int = 0
    reached: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("exit", "rest", "handoff"), 0.0))

    def copy(self) -> Tally:
        return replace(self, seconds=dict(self.seconds))


class Lane:
    """Tokens on their way through the layers.

    Args:
        model: The target.
        batch: The tokens.
        taps: Layers after which states are kept.

    Attributes:
        layer: Layers that are done.
        hidden: [1, T, hidden] after them.
        tapped: By layer, [T, hidden].
    """

    def __init__(self, model: TargetModel, batch: ForwardBatch, taps: Sequence[int]) -> None:
        self._segments, self._wanted = model.segments, taps
        self._attention = model.attention(model.kv, batch)
        with forward_batch(self._attention):
            state, self._noted = self._segments.begin(batch.tokens, batch.positions)
        self.layer, self.hidden, self._home = 0, state[None], state.device
        self.tapped: dict[int, torch.Tensor] = {0: state} if 0 in taps else {}

    def advance(self, end: int, enough: threading.Event | None = None, pace: Callable[[], None] = lambda: None) -> None:
        """Runs layers until so many are done, or it is enough; `pace` returns when a layer that was begun is done."""
        with forward_batch(self._attention):
            while self.layer < end and not (enough is not None and enough.is_set()):
                self.hidden = self._segments.run_layer(self.layer, self.hidden, self._noted[self.layer])
                pace()
                self.layer += 1
                if self.layer in self._wanted:
                    self.tapped[self.layer] = self.hidden[0].to(self._home)

    def resume(self, layer: int, hidden: torch.Tensor, tapped: Mapping[int, torch.Tensor]) -> None:
        """Goes on behind layers that were done elsewhere. hidden, tapped: [T, hidden]."""
        self.layer, self.hidden = layer, hidden[None]
        self.tapped |= tapped

    def state(self, token: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Where one token is: [hidden], and the same by tap."""
        return self.hidden[0, token], {tap: states[token] for tap, states in self.tapped.items()}


class Pipeline:
    """Runs steps of one token a row with a head start for the next one.

    Args:
        model: The target. The unit is a thread with half of the cores on CPU, and a stream of its own on CUDA. Where
            two devices share the layers, the first one begins next tokens while the other one finishes this one.
        exit_layer: Layers after which candidates are read off; at least half of them, so that a unit never needs a
            candidate of its own.
        part: What a trained exit does to the state in front of the norm and the vocabulary.

    Attributes:
        tally: What came of it.
    """

    def __init__(
        self, model: TargetModel, exit_layer: int, part: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._model, self._exit, self._part = model, exit_layer, part
        self._starts: dict[int, HeadStart] = {}
        if model.by_paths:
            native.load_programs()  # which takes half a minute the first time
        self._unit = Unit(model.devices)
        self.tally = Tally()

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether a step is one in which every row runs its last known token only."""
        return all(row.samples and row.count == 1 and not row.prompt_reads for row in rows)

    def drop(self) -> None:
        """Forgets head starts, as where a step is not pipelined."""
        self._starts.clear()
        self._unit.rest()

    def close(self) -> None:
        """Ends the unit."""
        self._starts.clear()
        self._unit.close()

    def verify(self, rows: Sequence[Row], candidates: Sequence[int], taps: Sequence[int]) -> Scores:
        """Runs every row's last known token, and begins the next one.

        Args:
            rows: See `fits`; behind the known tokens each has room in its pages for its candidates.
            candidates: Per row, how many.
            taps: As in `TargetModel.verify`, like what is returned.
        """
        began = self._unit.now()
        self._unit.take()
        lane = self._resumed(rows, taps)
        lane.advance(self._exit)
        state = lane.hidden[0].to(self._model.device)
        at_exit, enough = self._unit.now(), threading.Event()
        begun = self._unit.run(lambda: self._begin(rows, candidates, state, taps, enough))
        try:
            lane.advance(self._model.segments.num_layers)
            last = [tap for tap in taps if tap > self._model.segments.num_layers]
            out = self._model.head(lane.hidden[0], taps=last)
            known = self._unit.now()
            self._unit.await_target()
        finally:
            finished = time.perf_counter()
            enough.set()
            failed = begun.exception()
        self._unit.join()
        if failed is None:
            self._hand_over(rows, out.logits, *begun.result())
        else:  # this token is as it would be; the drafter hears of it with its next offer
            logger.error("beginning the next token failed: %s", failed, exc_info=failed)
            self._unit.rest()
            self._model.pipeline = None
        self.tally.seconds["exit"] += seconds_between(began, at_exit)
        self.tally.seconds["rest"] += seconds_between(at_exit, known)
        self.tally.seconds["handoff"] += time.perf_counter() - finished
        return Scores(out.logits, tuple(range(len(rows))), ((),) * len(rows), lane.tapped | out.taps)

    def _resumed(self, rows: Sequence[Row], taps: Sequence[int]) -> Lane:
        """All rows where the head starts end, if there are any; those without one are brought there alone."""
        model = self._model

        def lane(some: Sequence[Row]) -> Lane:
            return Lane(model, pack(some, [None] * len(some), model.kv.page_size, model.device), taps)

        starts = [self._start_of(row) for row in rows]
        self._starts.clear()
        self.tally.layers += sum(start.layers for start in starts if start)
        whole, done = lane(rows), max((start.layers for start in starts if start), default=0)
        if not done:
            return whole
        behind = [line for line, start in enumerate(starts) if start is None]
        missed = lane([rows[line] for line in behind]) if behind else None
        if missed is not None:
            missed.advance(done)
        places = iter(range(len(behind)))

        def states(of_start: Callable[[HeadStart], torch.Tensor], of_missed: torch.Tensor | None) -> torch.Tensor:
            found = []
            for start in starts:
                if start is not None:
                    found.append(of_start(start))
                else:
                    assert of_missed is not None
                    found.append(of_missed[next(places)])
            return torch.stack(found)

        tapped = {}
        for tap in [tap for tap in taps if 0 < tap <= done]:
            tapped[tap] = states(lambda start, tap=tap: start.taps[tap], missed.tapped[tap] if missed else None)
            places = iter(range(len(behind)))
        whole.resume(done, states(lambda start: start.hidden, missed.hidden[0] if missed else None), tapped)
        return whole

    def _start_of(self, row: Row) -> HeadStart | None:
        """A row's head start, if it was for the token that came, and its KV is still where it was put."""
        start, position = self._starts.get(row.seq), row.length - 1
        if start is None or (start.token, start.position) != (row.tokens[position], position):
            return None
        return start if start.slot == self._slot(row, position) else None

    def _begin(
        self,
        rows: Sequence[Row],
        candidates: Sequence[int],
        hidden: torch.Tensor,
        taps: Sequence[int],
        enough: threading.Event,
    ) -> tuple[list[list[int]], Lane]:
        """The other unit's work. hidden: [R, hidden] after the exit layer.

        Returns:
            Each row's candidates, and how far all of them have come.
        """
        model = self._model
        likely = model.head(hidden, self._part).logits.topk(max(candidates)).indices.tolist()
        tokens = [some[:count] for some, count in zip(likely, candidates, strict=True)]
        size = model.kv.page_size
        packed = [
            pack_row((), row.length, row.pages, size, Tree((-1,) * len(some)), some)
            for row, some in zip(rows, tokens, strict=True)
        ]
        lane = Lane(model, join(packed, [False] * len(packed), model.device), taps)
        lane.advance(self._exit, enough, self._unit.pace)
        return tokens, lane

    def _hand_over(
        self, rows: Sequence[Row], logits: torch.Tensor, tokens: Sequence[Sequence[int]], ahead: Lane
    ) -> None:
        """Keeps the candidates that are next, which for a greedy row follows from the logits [R, vocab]."""
        sources, destinations, first = [], [], 0
        self.tally.forks += len(rows)
        self.tally.reached += ahead.layer * len(rows)
        for row, some, token in zip(rows, tokens, argmax(logits).tolist(), strict=True):
            place = some.index(token) if token in some else -1
            self.tally.matches += place >= 0
            if place >= 0 and ahead.layer:
                slot = self._slot(row, row.length)
                sources.append(self._slot(row, row.length + place))
                destinations.append(slot)
                hidden, taps = ahead.state(first + place)
                self._starts[row.seq] = HeadStart(token, row.length, slot, ahead.layer, hidden, taps)
            first += len(some)
        self._model.kv.move(sources, destinations, ahead.layer)

    def _slot(self, row: Row, place: int) -> int:
        size = self._model.kv.page_size
        return row.pages[place // size] * size + place % size
