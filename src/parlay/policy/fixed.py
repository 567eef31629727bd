"""Policies that bet the same on every row of a step: off, a fixed tree, and a length by batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from parlay.bets import NO_TREE, Bet, Tree
from parlay.policy.base import PolicyRow
from parlay.policy.synergy import LengthTable
from parlay.policy.trees import overlap, subtree
from parlay.types import EVERYTHING, Offer, StepPlan, StepResult


def bet_alike(wanted: Bet, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
    """Bets one method and at most its tree on every row that may bet, for as long as the budget lasts."""
    bets: list[Bet | None] = []
    for row, some in zip(rows, offers, strict=True):
        offer = next((offer for offer in some if offer.method == wanted.method), None)
        bound = NO_TREE
        if offer is not None and wanted.tree:
            tree = Tree.chain(len(wanted.tree)) if offer.ahead else wanted.tree
            bound = subtree(offer.tree, overlap(offer.tree, tree)).trim(budget, row.max_depth)
        budget -= len(bound)
        bets.append(replace(wanted, tree=bound) if bound else None)
    return StepPlan(tuple(bets))


class Off:
    """Never bets."""

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        return StepPlan((None,) * len(rows), resting=EVERYTHING)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass


class Fixed:
    """Bets the same whatever the load: the baseline that an adaptive policy has to beat.

    Args:
        method: The drafter's name.
        tree: The largest tree of a row.
        free: See `Bet`.
    """

    def __init__(self, method: str, tree: Tree, free: bool = False) -> None:
        self.bet = Bet(method, tree, free)

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        return bet_alike(self.bet, rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass


class Synergy:
    """Bets chains of the length that was profiled for so many rows, and looks at nothing else (arXiv 2310.18813).

    Args:
        method: The drafter's name.
        lengths: Best length by batch size.
    """

    def __init__(self, method: str, lengths: Mapping[int, int]) -> None:
        self.method = method
        self.table = LengthTable(lengths)

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        emitting = sum(row.samples for row in rows)
        length = self.table[emitting] if emitting else 0
        return bet_alike(Bet(self.method, Tree.chain(length)), rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass
