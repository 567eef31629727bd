from __future__ import annotations

from parlay.bets import Bet, Tree
from parlay.policy.fixed import Fixed
from parlay.policy.own_bets import plan_around
from parlay.types import Offer
from tests.policy.machine import FakeRow

OFFERS = [Offer("eagle", Tree.chain(6)), Offer("suffix", Tree.chain(3))]
POLICY = Fixed("suffix", Tree.chain(2))


def bets(own: list[Bet | None], budget: int = 100) -> list[tuple[str, int] | None]:
    rows = [FakeRow(seq) for seq in range(len(own))]
    found = plan_around(POLICY, own, rows, [OFFERS] * len(own), budget).bets
    return [None if bet is None else (bet.method, len(bet.tree)) for bet in found]


def test_a_row_gets_what_it_asked_for_and_the_policy_decides_for_others() -> None:
    own = [None, Bet("eagle", Tree.chain(4)), None, Bet("suffix", Tree.chain(9)), Bet("nobody", Tree.chain(2))]
    assert bets(own) == [("suffix", 2), ("eagle", 4), ("suffix", 2), ("suffix", 3), None]
    assert bets([None, None]) == [("suffix", 2), ("suffix", 2)]


def test_own_bets_take_the_budget_first() -> None:
    assert bets([None, Bet("eagle", Tree.chain(4)), None], budget=7) == [("suffix", 2), ("eagle", 4), ("suffix", 1)]
    assert bets([None, Bet("eagle", Tree.chain(9))], budget=3) == [None, ("eagle", 3)]
