"""Rows whose requests say themselves what to bet: no policy decides for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from parlay.bets import Bet
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.fixed import bet_alike
from parlay.types import Offer, StepPlan


def plan_around(
    policy: Policy,
    own: Sequence[Bet | None],
    rows: Sequence[PolicyRow],
    offers: Sequence[Sequence[Offer]],
    budget: int,
) -> StepPlan:
    """Makes the bets that rows asked for, as far as drafters offer them, and lets the policy decide for the others.

    Args:
        policy: It sees all rows, those with bets of their own as rows for which nothing may be guessed.
        own: Per row, what it asked for.
        rows: Dataclasses; see `Policy.plan`, like the next two.
        offers: Per row.
        budget: Guesses; own bets take theirs first.
    """
    if not any(own):
        return policy.plan(rows, offers, budget)
    bets: list[Bet | None] = []
    for bet, row, some in zip(own, rows, offers, strict=True):
        made = bet_alike(bet, [row], [some], budget).bets[0] if bet is not None else None
        budget -= len(made.tree) if made is not None else 0
        bets.append(made)
    others = [() if bet is not None else some for bet, some in zip(own, offers, strict=True)]
    seen = [row if bet is None else replace(cast(Any, row), max_depth=0) for bet, row in zip(own, rows, strict=True)]
    planned = policy.plan(seen, others, budget)
    return replace(planned, bets=tuple(mine or bet for mine, bet in zip(bets, planned.bets, strict=True)))
