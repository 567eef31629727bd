"""Bets the same on every row, whatever the load: the baseline that an adaptive policy has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from parlay.policy.base import PolicyRow
from parlay.policy.trees import overlap, subtree
from parlay.types import NO_TREE, Bet, Offer, StepPlan, StepResult, Tree


class Off:
    """Never bets."""

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        return StepPlan((None,) * len(rows))

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass


class Fixed:
    """Bets one method and tree on every row that may bet, for as long as the budget lasts.

    Args:
        method: The drafter's name.
        tree: The largest tree of a row.
    """

    def __init__(self, method: str, tree: Tree) -> None:
        self.method = method
        self.tree = tree

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        bets: list[Bet | None] = []
        for row, some in zip(rows, offers, strict=True):
            offer = next((offer for offer in some if offer.method == self.method), None)
            tree = NO_TREE
            if offer is not None:
                nodes = overlap(offer.tree, self.tree)
                tree = subtree(offer.tree, nodes).trim(budget, row.max_depth)
            budget -= len(tree)
            bets.append(Bet(self.method, tree) if tree else None)
        return StepPlan(tuple(bets))

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass
