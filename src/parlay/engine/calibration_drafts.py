"""What drafters cost: their levels, rows and guesses, and reading what they have missed."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from parlay.bets import likely_tree
from parlay.drafters.base import Drafter
from parlay.engine.stopwatch import TREES, WIDE, Limits, Shape, Stopwatch
from parlay.policy.base import PolicyRow
from parlay.policy.cost import DraftCost, nonnegative_least_squares
from parlay.policy.fixed import Fixed
from parlay.types import Offer, Request, SamplingParams, StepPlan, StepResult

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

logger = logging.getLogger(__name__)

READ = 192  # tokens of a prompt that drafters read late
WIDE_TREES = (likely_tree(16, 6), likely_tree(64, 8), likely_tree(256, 12))  # where layers stream


def time_drafter(
    watch: Stopwatch, drafter: Drafter, limits: Limits, rounds: int, per_catch_up: float, streams: bool
) -> DraftCost:
    """What a drafter's levels, rows and guesses cost."""
    lines: list[tuple[float, ...]] = []
    wide = [(Shape(1, 96, WIDE[-1]), WIDE_TREES)] if streams else []
    usual = (Shape(1, 64, 1), Shape(4, 64, 1), Shape(16, 64, 1), Shape(1, 480, 1), Shape(4, 480, 1))
    for shape, trees in [*((shape, TREES) for shape in usual), *wide]:
        if not limits.allows(shape):
            continue
        rows = watch.rows(shape)
        _, ready = watch.draft(drafter, rows, TREES[0])
        for _ in range(2 * shape.rows * shape.context // 32):  # what a drafter reads of missed tokens in one step
            if ready:
                break
            _, ready = watch.draft(drafter, rows, TREES[0])
        for wanted in trees if ready else ():
            tree = watch.offered(drafter, rows, wanted)
            if not tree:
                continue
            seconds = statistics.median(watch.draft(drafter, rows, tree)[0] for _ in range(rounds))
            held = shape.rows * shape.context
            lines.append((1.0, tree.depth, shape.rows, shape.rows * len(tree), held, seconds))
        for row in rows:
            drafter.forget(row.seq)
    if not lines:
        logger.warning("drafter %s gave no guesses to be timed, so its cost is taken from serving", drafter.name)
        return DraftCost()
    table = np.array(lines)
    fitted = nonnegative_least_squares(table[:, :-1] / table[:, -1:], np.ones(len(table)))
    return DraftCost(*map(float, fitted), per_catch_up=per_catch_up)


class _Late:
    """Bets one guess of a drafter once a prompt is read, which it then has to read as well.

    Attributes:
        seconds: Of every draft, with the tokens that had to be read first.
    """

    def __init__(self, method: str) -> None:
        self._method, self._catch_up = method, 0
        self.seconds: list[tuple[int, float]] = []

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        plan = Fixed(self._method, TREES[0]).plan(rows, offers, budget)
        bets = [bet if row.count == 1 else None for row, bet in zip(rows, plan.bets, strict=True)]
        self._catch_up = sum(o.catch_up for some in offers for o in some if o.method == self._method)
        return StepPlan(tuple(bets))

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        if any(got.method == self._method for got in result.rows):
            self.seconds.append((self._catch_up, result.seconds["draft"]))


def time_reading(engine: Engine, drafter: Drafter, rounds: int) -> float:
    """Seconds for a token that a drafter reads late, of real requests."""
    policy, late = engine.policy, _Late(drafter.name)
    engine.policy, chance = late, random.Random(1)
    length = min(READ, engine.max_model_len - 8, engine.config.max_num_batched_tokens)
    for number in range(rounds):  # of different prompts, or there would be nothing to read
        prompt = tuple(chance.randrange(min(1000, engine.vocab_size)) for _ in range(length))
        engine.add(
            Request(f"calibration {number}", prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        )
        while engine.has_work:
            engine.step()
    engine.policy = policy
    usual = statistics.median([seconds for missed, seconds in late.seconds if not missed] or [0.0])
    return statistics.median([max(0.0, s - usual) / missed for missed, s in late.seconds if missed] or [0.0])
