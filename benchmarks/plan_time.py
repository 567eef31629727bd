"""How long the goodput policy takes to decide a step, beside the time that it decides about.

Plans a running batch step after step: every row has offers of four methods (a chain whose length differs from row to
row, a tree with the drafter's own confidence, and two large trees of drafters that pay for levels), and what is bet is
accepted at random, so that estimates move as they do while serving. Needs no model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parlay.bench import environment, report
from parlay.bench.report import progress
from parlay.bets import Tree
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.policy.outcomes import Outcomes
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.server import SimulatedRow
from parlay.policy.trees import by_level, subtree
from parlay.policy.workload import Kind
from parlay.types import Offer, RowResult, StepResult

BAR = 1.0  # milliseconds, for 64 rows
ACCEPTANCE = {
    "prompt_lookup": np.array([0.4]),
    "suffix": np.array([0.45, 0.1]),
    "draft_model": np.array([0.7, 0.12, 0.05, 0.02]),
    "eagle": np.array([0.75, 0.1, 0.04, 0.02]),
}
PROFILE = Profile(
    "made up", "8B", "bfloat16",
    VerifyCost((1, 64, 128, 512), (0.0070, 0.0078, 0.0090, 0.0180), 0.0, 4.9e-8),
    {"draft_model": DraftCost(0.0003, 0.0008, 5e-6), "eagle": DraftCost(0.0004, 0.00045, 5e-6, 1e-6, 3e-9, 1e-6)},
    HostCost(0.0003, 3e-6, 1e-6),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanTime:
    """Milliseconds of real time, and what was decided about."""

    rows: int
    methods: int
    budget: int
    guesses: float  # per step
    plan_median: float
    plan_p99: float
    plan_worst: float
    observe_median: float


@dataclass(frozen=True, slots=True)
class PlanTimes:
    """All results of this benchmark."""

    steps: int
    results: tuple[PlanTime, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="default: %(default)s")
    parser.add_argument("--methods", type=int, default=4, choices=range(1, 5), help="default: %(default)s")
    parser.add_argument("--budget", type=int, default=256, help="most guesses of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/plan_time.json"))
    options = parser.parse_args()
    captured = environment.capture()
    results = []
    with progress("planning", len(options.rows)) as advance:
        for rows in options.rows:
            results.append(run(rows, options.methods, options.budget, options.steps))
            advance()
    environment.write_json(options.json, captured, PlanTimes(options.steps, tuple(results)))
    show(results)


def run(num_rows: int, methods: int, budget: int, steps: int) -> PlanTime:
    rng = np.random.default_rng(0)
    offers = [offers_of(rng, methods) for _ in range(num_rows)]
    kinds = [Kind("all", 1.0, ACCEPTANCE)]
    outcomes, policy = Outcomes(kinds), Goodput(PROFILE)
    planning, observing, guesses = [], [], []
    rows = [SimulatedRow(seq, 300 + 10 * seq, 1, True, 12) for seq in range(num_rows)]
    for step in range(steps):
        for row in rows:
            row.start += 2
        began = time.perf_counter()
        plan = policy.plan(rows, offers, budget)
        planned = time.perf_counter()
        result = outcome(plan, outcomes, rng)
        guesses.append(sum(len(row.tree) for row in result.rows))
        resumed = time.perf_counter()
        policy.observe(rows, result)
        if step >= steps // 10:
            planning.append(1000 * (planned - began))
            observing.append(1000 * (time.perf_counter() - resumed))
    planning.sort()
    return PlanTime(
        num_rows,
        methods,
        budget,
        statistics.mean(guesses),
        statistics.median(planning),
        planning[int(0.99 * len(planning))],
        planning[-1],
        statistics.median(observing),
    )


def offers_of(rng: np.random.Generator, methods: int) -> list[Offer]:
    """What the four drafters offer to one row."""
    some = by_level([3, 2, 2])
    nodes = sorted(range(len(some)), key=lambda node: (node > 2, rng.random()))[:12]
    kept: list[int] = [node for node in range(len(some)) if node in nodes and some.parents[node] in (-1, *nodes)]
    tree = subtree(some, [node for node in kept if _rooted(some, node, set(kept))])
    confidence = tuple(float(p) for p in rng.uniform(0.1, 0.8, len(tree)))
    return [
        Offer("prompt_lookup", Tree.chain(int(rng.integers(2, 9)))),
        Offer("suffix", tree, confidence=confidence),
        Offer("draft_model", _TREES["draft_model"]),
        Offer("eagle", _TREES["eagle"]),
    ][:methods]


def _rooted(tree: Tree, node: int, kept: set[int]) -> bool:
    return node < 0 or (node in kept and _rooted(tree, tree.parents[node], kept))


_TREES = {
    "draft_model": OptimalTrees(ACCEPTANCE["draft_model"], 32, 8).tree(32, 8),
    "eagle": OptimalTrees(ACCEPTANCE["eagle"], 64, 8).tree(64, 8),
}


def outcome(plan: object, outcomes: Outcomes, rng: np.random.Generator) -> StepResult:
    bets = [0 if bet is None else outcomes.bet(bet.method, bet.tree) for bet in plan.bets]  # type: ignore[attr-defined]
    numbers = np.array(bets)
    none = np.zeros_like(numbers)
    ends, _ = outcomes.draw(numbers, none, rng.random(len(bets)), none, none)
    results = []
    for bet, end in zip(bets, ends.tolist(), strict=True):
        method, tree = outcomes.bets[bet]
        path = outcomes.paths[bet][end]
        results.append(RowResult(method, tree, path, (0,) * (len(path) + 1)))
    return StepResult(tuple(results), {"verify": 0.01, "draft": 0.004, "accept": 0.0005})


def show(results: list[PlanTime]) -> None:
    columns = ("rows", "methods", "guesses/step", "plan, median ms", "p99", "worst", "observe, median ms")
    lines = [
        (r.rows, r.methods, f"{r.guesses:.0f}", *(f"{v:.2f}" for v in (r.plan_median, r.plan_p99, r.plan_worst)),
         f"{r.observe_median:.2f}")
        for r in results
    ]  # fmt: skip
    report.console().print(report.table("deciding one step", columns, lines))
    for r in results:
        if r.rows == 64:
            verdict = "met" if r.plan_median < BAR else "missed"
            print(f"64 rows: {r.plan_median:.2f} ms (bar: < {BAR:g} ms, {verdict})")


if __name__ == "__main__":
    main()
