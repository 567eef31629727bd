"""What steps take beside their passes and greedy guesses, of real requests, whose tokens can be anything."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parlay.engine.stopwatch import TREES
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.cost import DraftCost, HostCost, nonnegative_least_squares
from parlay.policy.fixed import Fixed, Off
from parlay.types import Offer, Request, SamplingParams, StepPlan, StepResult

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

PROMPT = 8  # tokens
STEPS, ENOUGH = 6, 3  # steps to time, and the fewest of a kind
TEMPERATURES = 0.0, 1.0
BET = (TREES[0], *TREES[2:])


class Kind(NamedTuple):
    """What was bet in a step."""

    rows: int
    levels: int
    guesses: int


class Took(NamedTuple):
    """Seconds of a step by part."""

    draft: float
    host: float


Timed = Mapping[Kind, Took]


class HostTimes(NamedTuple):
    """See `parlay.policy.cost.Profile`."""

    host: HostCost
    sampling: HostCost
    drawing: Mapping[str, DraftCost]
    choosing: DraftCost


def time_host(
    engine: Engine,
    rows: int,
    per_guess: float,
    methods: Sequence[str],
    seconds: float,
    advance: Callable[[float], None],
) -> HostTimes:
    """What the host takes, and more of it where rows sample; what drawing guesses takes more, and choosing among them.

    Args:
        engine: Idle.
        rows: As many at a time, and single ones.
        per_guess: Seconds of choosing, by guess of a greedy row.
        methods: Whose guesses are drawn; what is not timed when time is up counts for nothing.
        seconds: After which nothing more is begun.
        advance: Told how much is done, from 0 to 1.
    """
    end = time.monotonic() + seconds
    greedy, sampled = (_run(engine, Off(), rows, temperature) for temperature in TEMPERATURES)
    host, sampling = plain_costs(greedy, sampled, per_guess)
    drawing, chosen = dict.fromkeys(methods, DraftCost()), list[tuple[Kind, float]]()
    for place, method in enumerate(methods):
        drawn: list[tuple[Kind, float]] = []
        for tree in BET:
            if time.monotonic() > end:
                break
            greedy, sampled = (_run(engine, Fixed(method, tree), rows, temperature) for temperature in TEMPERATURES)
            for kind in greedy.keys() & sampled.keys():
                if kind.guesses:
                    drawn.append((kind, sampled[kind].draft - greedy[kind].draft))
                    chosen.append((kind, sampled[kind].host - greedy[kind].host - sampling(kind.rows, 0.0)))
        drawing[method] = fitted(drawn)
        advance((place + 1) / len(methods))
    return HostTimes(host, sampling, drawing, fitted(chosen))


def plain_costs(greedy: Timed, sampled: Timed, per_guess: float) -> tuple[HostCost, HostCost]:
    """Of steps without guesses; a small pool or budget may have let fewer rows run together than asked."""
    seconds = {kind.rows: took.host for kind, took in greedy.items()}
    more = {kind.rows: took.host - seconds[kind.rows] for kind, took in sampled.items() if kind.rows in seconds}
    return HostCost(*_line(seconds), per_guess), HostCost(*_line(more))


def _line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Seconds once and by row, through the fewest rows and the most."""
    if not seconds:
        return 0.0, 0.0
    few, many = min(seconds), max(seconds)
    per_row = max(0.0, (seconds[many] - seconds[few]) / max(1, many - few))
    return max(0.0, seconds[few] - few * per_row), per_row


def fitted(lines: Sequence[tuple[Kind, float]]) -> DraftCost:
    """Seconds by steps, levels, rows and guesses, least squares; nothing where nothing was timed."""
    if not lines:
        return DraftCost()
    kinds, seconds = zip(*lines, strict=True)
    table = np.array([(1, kind.levels, kind.rows, kind.guesses) for kind in kinds], dtype=float)
    return DraftCost(*nonnegative_least_squares(table, np.array(seconds)).tolist())


class _Noted:
    """A policy that does what another one does, and keeps what steps took in which all rows bet alike."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.steps: defaultdict[Kind, list[Took]] = defaultdict(list)
        self.reads = True  # whether some row read more than one token in the last step

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        return self._policy.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        trees = {got.tree for got in result.rows}
        self.reads = not all(row.samples and row.count == 1 for row in rows)
        if len(trees) == 1 and not self.reads:
            host = sum(seconds for part, seconds in result.seconds.items() if part not in ("verify", "draft"))
            (tree,) = trees
            kind = Kind(len(rows), tree.depth, len(rows) * len(tree))
            self.steps[kind].append(Took(result.seconds["draft"], host))


def _run(engine: Engine, policy: Policy, rows: int, temperature: float) -> Timed:
    """Medians, of kinds of steps that were often enough."""
    before, noted = engine.policy, _Noted(policy)
    engine.policy = noted
    prompt = tuple(range(min(PROMPT, engine.vocab_size)))
    params = SamplingParams(temperature=temperature, max_tokens=engine.max_model_len - len(prompt), ignore_eos=True)
    for count in sorted({1, rows}):
        names = [f"calibration {number}" for number in range(count)]
        for name in names:
            engine.add(Request(name, prompt, params))
        left, patience = STEPS, count * PROMPT
        while left and patience and engine.has_work:
            engine.step()
            left, patience = (left, patience - 1) if noted.reads else (left - 1, patience)
        for name in names:
            engine.abort(name)
    engine.policy = before
    return {
        kind: Took(statistics.median(took.draft for took in some), statistics.median(took.host for took in some))
        for kind, some in noted.steps.items()
        if len(some) >= ENOUGH
    }
