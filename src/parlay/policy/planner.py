"""What to bet by batch size, worked out ahead of time from a profile and an acceptance: the tables of `parlay plan`.

All rows are taken to be alike. The best tree of n guesses and d levels is Sequoia's (`parlay.policy.sequoia`), which
Synergy's question, how many guesses at this batch size, is then asked of: maximise tokens per second over method, n, d
and no bet at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parlay.bets import NO_TREE, Tree
from parlay.policy.cost import Profile
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.synergy import LengthTable
from parlay.policy.trees import Floats, Ints


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The best bet at one batch size.

    Attributes:
        batch: Rows.
        method: Whose guesses; None for no bet.
        tree: What is bet on every row.
        tokens_per_step: Of one row.
        seconds: A step.
        speedup: Tokens per second over those without a bet.
    """

    batch: int
    method: str | None
    tree: Tree
    tokens_per_step: float
    seconds: float
    speedup: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return self.batch * self.tokens_per_step / self.seconds


class Planner:
    """Finds the best bet for any batch size.

    Args:
        profile: What steps cost.
        acceptance: By method, [children] or [levels, children]; only the first child of each counts for chains.
        context: Tokens of a row's context.
        size: Most guesses of a row.
        depth: Most levels.
        chains: Whether only chains may be bet.
        sampled: Whether rows sample their tokens.
    """

    def __init__(
        self,
        profile: Profile,
        acceptance: Mapping[str, Floats],
        *,
        context: int = 512,
        size: int = 64,
        depth: int = 12,
        chains: bool = False,
        sampled: bool = False,
    ) -> None:
        self._profile, self._context, self._sampled = profile, context, sampled
        matrices = {name: np.atleast_2d(matrix)[:, : 1 if chains else None] for name, matrix in acceptance.items()}
        size = min(size, depth) if chains else size
        self._trees = {name: OptimalTrees(matrix, size, depth) for name, matrix in matrices.items()}

    def seconds(self, batch: int, sizes: Floats | Ints, depth: Floats | Ints, method: str | None) -> Floats:
        """[..] of a step in which every row has trees of these sizes and depths."""
        profile, context = self._profile, batch * self._context
        guesses = batch * np.asarray(sizes, dtype=np.float64)
        sampled = batch if self._sampled else 0
        total = profile.verify(batch + guesses, batch, context) + profile.around(batch, guesses, sampled)
        if method is not None:
            cost = profile.draft(method)
            if self._sampled:
                cost = sum(profile.sampled(method), start=cost)
            total = total + (cost(0, batch, 0, context) + cost.per_level * depth + cost.per_guess * guesses)
        return total

    def best(self, batch: int) -> BatchPlan:
        """The bet with the most tokens per second, or none where none has more than plain decoding."""
        plain = float(self.seconds(batch, np.zeros(1), np.zeros(1), None)[0])
        found = BatchPlan(batch, None, NO_TREE, 1.0, plain, 1.0)
        for method, trees in self._trees.items():
            if not (trees.size and trees.depth):
                continue
            sizes, depths = np.arange(1, trees.size + 1), np.arange(1, trees.depth + 1)[:, None]
            seconds = self.seconds(batch, sizes, depths, method)
            emitted = trees.emitted[1:, 1:]
            place, column = np.unravel_index(np.argmax(emitted / seconds), seconds.shape)
            speedup = float(emitted[place, column] / seconds[place, column] * plain)
            if speedup > found.speedup * (1 + 1e-9):
                tree = trees.tree(int(column) + 1, int(place) + 1)
                tokens, time = float(emitted[place, column]), float(seconds[place, column])
                found = BatchPlan(batch, method, tree, tokens, time, speedup)
        return found

    def break_even(self, most: int) -> int | None:
        """The largest batch size up to `most` at which a bet pays; None where none does."""
        return max((batch for batch in range(1, most + 1) if self.best(batch).method is not None), default=None)


def length_table(planner: Planner, batches: Iterable[int]) -> LengthTable:
    """Synergy's table of chain lengths, of a planner for chains."""
    return LengthTable({batch: len(planner.best(batch).tree) for batch in batches})


def vllm_bands(table: LengthTable, most: int) -> list[list[int]]:
    """vLLM's `num_speculative_tokens_per_batch_size`: first and last batch size and length, from 1 to `most`."""
    return [
        [first, min(most, last) if last is not None else most, length]
        for first, last, length in table.bands()
        if first <= most
    ]


def trtllm_schedule(bands: Sequence[Sequence[int]]) -> dict[int, int]:
    """TensorRT-LLM's `draft_len_schedule`: length by the last batch size that it holds for; none beyond the last.

    It wants no length to be larger than that of the smallest batch size, so lengths that rise again are cut.
    """
    schedule: dict[int, int] = {}
    least = bands[0][2]
    for _, last, length in bands:
        least = min(least, length)
        if least:
            schedule[last] = least
    return schedule or {1: 0}
