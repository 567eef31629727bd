"""Steps without a model: a policy on a machine that costs what a profile says, with known acceptance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parlay.bets import NO_TREE, Bet, Tree
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.cost import Profile
from parlay.types import Offer, RowResult, Speculation, StepPlan, StepResult


@dataclass
class FakeRow:
    """What a policy sees of a row, to be set at will."""

    seq: int
    start: int = 200
    count: int = 1
    samples: bool = True
    max_depth: int = 16
    speculation: Speculation = "auto"
    target_tpot: float | None = None
    is_greedy: bool = True


def rows(count: int) -> list[FakeRow]:
    return [FakeRow(seq) for seq in range(count)]


def guesses(plan: StepPlan) -> int:
    return sum(len(bet.tree) for bet in plan.bets if bet is not None)


def walk(tree: Tree, p: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """The accepted path under an acceptance vector or matrix."""
    matrix, children, path, node = np.atleast_2d(p), tree.children(), [], -1
    while node in children:
        row = matrix[min(len(path), len(matrix) - 1)]
        rank = int(np.searchsorted(np.cumsum(row), rng.random(), side="right"))
        if rank >= len(children[node]):
            break
        node = children[node][rank]
        path.append(node)
    return tuple(path)


def _totals(trees: Sequence[Tree]) -> tuple[int, int, int, int]:
    """Levels, rows, guesses and no context."""
    return max(tree.depth for tree in trees), len(trees), sum(map(len, trees)), 0


class Machine:
    """Runs a policy's steps.

    Args:
        policy: Who decides.
        accept: Acceptance of a first child, by method; that of a second one is 0.05.
        profile: What a step costs.
    """

    def __init__(self, policy: Policy, accept: Mapping[str, float], profile: Profile) -> None:
        self.policy, self.accept, self.profile = policy, accept, profile
        self.slower, self.rng = 1.0, np.random.default_rng(0)
        self.tokens, self.seconds = 0, 0.0

    def step(self, rows: Sequence[PolicyRow], offers: Sequence[Offer], budget: int = 256) -> StepPlan:
        plan = self.policy.plan(rows, [list(offers)] * len(rows), budget)
        results = [self._result(bet) for bet in plan.bets]
        guesses = sum(len(got.tree) for got in results)
        new, context = sum(row.count for row in rows), sum(row.start + row.count for row in rows)
        verify = float(self.profile.verify(new + guesses, len(rows), context))
        sampled = sum(not row.is_greedy for row in rows)
        drawing, choosing = self._sampled(rows, results)
        host = self.profile.around(len(rows), guesses, sampled) + choosing
        seconds = {"verify": verify, "draft": self._draft(results) + drawing, "accept": host}
        seconds = {part: self.slower * time for part, time in seconds.items()}
        self.policy.observe(rows, StepResult(tuple(results), seconds))
        self.tokens += sum(len(got.emitted) for got in results)
        self.seconds += sum(seconds.values())
        return plan

    def _draft(self, results: Sequence[RowResult]) -> float:
        total = 0.0
        for name in {got.method for got in results if got.method is not None}:
            trees = [got.tree for got in results if got.method == name]
            total += self.profile.draft(name)(max(tree.depth for tree in trees), len(trees), sum(map(len, trees)), 0)
        return total

    def _sampled(self, rows: Sequence[PolicyRow], results: Sequence[RowResult]) -> tuple[float, float]:
        """What drawing guesses takes more, and choosing among them."""
        pairs = [(got.method, got.tree) for row, got in zip(rows, results, strict=True) if not row.is_greedy]
        drawn = {name: [tree for other, tree in pairs if other == name] for name in self.profile.drawing}
        drawing = sum(self.profile.drawing[name](*_totals(trees)) for name, trees in drawn.items() if trees)
        trees = list(itertools.chain.from_iterable(drawn.values()))
        return drawing, self.profile.choosing(*_totals(trees)) if trees else 0.0

    def _result(self, bet: Bet | None) -> RowResult:
        if bet is None:
            return RowResult(None, NO_TREE, (), (0,))
        path = walk(bet.tree, np.array([self.accept[bet.method], 0.05]), self.rng)
        return RowResult(bet.method, bet.tree, tuple(path), (0,) * (len(path) + 1))

    def rate(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate
