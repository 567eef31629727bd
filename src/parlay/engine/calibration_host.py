"""What steps take beside their passes and greedy guesses, of real requests, whose tokens can be anything."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parlay.engine.stopwatch import TREES
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.cost import DraftCost, HostCost, nonnegative_least_squares
from parlay.policy.fixed import Fixed, Off
from parlay.types import Offer, Request, SamplingParams, StepPlan, StepResult

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

PROMPT, STEPS = 8, 6  # tokens; steps of a request behind it
ENOUGH = 3  # steps of a kind
BET = (TREES[0], *TREES[2:])


class _Kind(NamedTuple):
    """What was bet in a step."""

    rows: int
    levels: int
    guesses: int


class _Took(NamedTuple):
    """Seconds of a step by part."""

    draft: float
    host: float


class _Noted:
    """A policy that does what another one does, and keeps what steps took in which all rows bet alike."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.steps: defaultdict[_Kind, list[_Took]] = defaultdict(list)

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        return self._policy.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        trees = {got.tree for got in result.rows}
        if len(trees) == 1 and all(row.samples and row.count == 1 for row in rows):
            host = sum(seconds for part, seconds in result.seconds.items() if part not in ("verify", "draft"))
            (tree,) = trees
            kind = _Kind(len(rows), tree.depth, len(rows) * len(tree))
            self.steps[kind].append(_Took(result.seconds["draft"], host))


def time_host(
    engine: Engine, rows: int, per_guess: float, methods: Sequence[str]
) -> tuple[HostCost, dict[str, DraftCost], DraftCost]:
    """The host's costs, and what drawing guesses and choosing among them takes more where rows sample.

    Args:
        engine: Idle.
        rows: As many at a time, and single ones.
        per_guess: Seconds of choosing, by guess of a greedy row.
        methods: Whose guesses are drawn.
    """
    greedy, sampled = (_run(engine, Off(), rows, temperature) for temperature in (0.0, 1.0))
    host = _host(greedy, sampled, per_guess)
    drawing: dict[str, DraftCost] = {}
    choosing: list[tuple[float, ...]] = []
    for method in methods:
        drawn: list[tuple[float, ...]] = []
        for tree in BET:
            greedy, sampled = (_run(engine, Fixed(method, tree), rows, temperature) for temperature in (0.0, 1.0))
            for kind in greedy.keys() & sampled.keys():
                if kind.guesses:
                    draft, chose = (after - before for before, after in zip(greedy[kind], sampled[kind], strict=True))
                    drawn.append((1.0, kind.levels, kind.rows, kind.guesses, draft))
                    choosing.append((1.0, kind.rows, kind.guesses, chose - host.per_sampled * kind.rows))
        per_step, per_level, per_row, per_drawn = _fitted(drawn, 4)
        drawing[method] = DraftCost(per_step, per_level, per_row, per_drawn)
    per_step, per_row, per_drawn = _fitted(choosing, 3)
    return host, drawing, DraftCost(per_step, 0.0, per_row, per_drawn)


def _run(engine: Engine, policy: Policy, rows: int, temperature: float) -> dict[_Kind, _Took]:
    """Medians, of kinds of steps that were often enough."""
    before, noted = engine.policy, _Noted(policy)
    engine.policy = noted
    prompt = tuple(range(min(PROMPT, engine.vocab_size)))
    for count in (1, rows):
        params = SamplingParams(temperature=temperature, max_tokens=engine.max_model_len - PROMPT, ignore_eos=True)
        names = [f"calibration {count} {number}" for number in range(count)]
        for name in names:
            engine.add(Request(name, prompt, params))
        for _ in range(1 + STEPS):
            engine.step()
        for name in names:
            engine.abort(name)
        while engine.has_work:
            engine.step()
    engine.policy = before
    return {
        kind: _Took(statistics.median(took.draft for took in some), statistics.median(took.host for took in some))
        for kind, some in noted.steps.items()
        if len(some) >= ENOUGH
    }


def _host(greedy: Mapping[_Kind, _Took], sampled: Mapping[_Kind, _Took], per_guess: float) -> HostCost:
    """From steps without guesses; a small pool or budget may have let fewer rows run together than asked."""
    seconds = {kind.rows: took.host for kind, took in greedy.items()}
    few, many = min(seconds), max(seconds)
    per_row = max(0.0, (seconds[many] - seconds[few]) / max(1, many - few))
    more = {kind.rows: took.host - seconds[kind.rows] for kind, took in sampled.items() if kind.rows in seconds}
    per_sampled = max(0.0, sum(more.values()) / max(1, sum(more)))
    return HostCost(max(0.0, seconds[few] - few * per_row), per_row, per_guess, per_sampled)


def _fitted(lines: Sequence[tuple[float, ...]], count: int) -> list[float]:
    """So many coefficients: of all columns but the last, which they should add up to; 0 of no lines."""
    if not lines:
        return [0.0] * count
    table = np.array(lines)
    return nonnegative_least_squares(table[:, :-1], table[:, -1]).tolist()
