"""Methods that are off cost nothing: nobody asks for their offers until the next fresh plan."""

from __future__ import annotations

import pytest

from parlay.bets import Tree
from parlay.policy.cost import DraftCost, Profile, VerifyCost
from parlay.policy.fixed import Fixed, Off
from parlay.policy.goodput import FRESH, Goodput
from parlay.types import Offer
from tests.policy.machine import FakeRow, Machine, rows

STEEP = VerifyCost((1, 64), (0.001, 0.064))  # every guess costs as much as a token
OFFERS = [Offer("suffix", Tree.chain(4)), Offer("eagle", Tree.chain(4))]


def machine(count: int, steps: int) -> tuple[Machine, list[bool]]:
    """And whether each of the steps, after a while, asked for offers of either method."""
    profile = Profile("m", "m", "f", STEEP, {"eagle": DraftCost(per_level=0.001)})
    found, resting, asked = Machine(Goodput(profile), {"suffix": 0.2, "eagle": 0.2}, profile), (), []
    for _ in range(100 + steps):
        offers = [offer for offer in OFFERS if offer.method not in resting]
        asked.append(bool(offers))
        resting = found.step(rows(count), offers).resting
    return found, asked[100:]


@pytest.mark.parametrize("count", [4, 40])
def test_what_is_not_worth_it_is_looked_at_now_and_then(count: int) -> None:
    _, asked = machine(count, 20 * FRESH)
    assert 20 <= sum(asked) <= 24


@pytest.mark.parametrize("count", [1, 8])
def test_whose_guesses_trees_take_in_is_asked_though_nobody_bets_on_it(count: int) -> None:
    profile = Profile("m", "m", "f", VerifyCost((1, 64), (0.01, 0.011)), {"head": DraftCost(per_level=1e-5)})
    policy = Goodput(profile)
    told, head, resting, asked = [], Offer("head", Tree.chain(4)), (), []
    shows = Offer("shows", Tree.chain(1), (7,), (0.1,))
    found = Machine(policy, {"shows": 0.0, "head": 0.75}, profile)
    for _ in range(20 * FRESH):
        offers = [offer for offer in (shows, head) if offer.method not in resting]
        plan = found.step(rows(count), offers)
        resting = plan.resting
        told.append(any(bet is not None and bet.method == "head" and bet.free for bet in plan.bets))
        asked.append(shows in offers)
    later = [said for free, said in zip(told[100:], asked[101:], strict=False) if free]
    assert len(later) > 10 * FRESH
    assert all(later)


def test_nobody_is_asked_for_rows_that_take_nothing_in() -> None:
    profile = Profile("m", "m", "f", VerifyCost((1, 64), (0.01, 0.011)), {"head": DraftCost(per_level=1e-5)})
    shows, head = Offer("shows", Tree.chain(1), (7,), (0.1,)), Offer("head", Tree.chain(4))
    found, resting, asked = Machine(Goodput(profile), {"shows": 0.0, "head": 0.75}, profile), (), []
    for _ in range(20 * FRESH):
        offers = [offer for offer in (shows, head) if offer.method not in resting]
        asked.append(shows in offers)
        resting = found.step([FakeRow(seq, is_greedy=False) for seq in range(8)], offers).resting
    assert sum(asked[100:]) < 4 * FRESH


def test_another_load_wakes_all_of_them() -> None:
    found, _ = machine(8, 3)
    plan = found.step(rows(2), [])  # nobody was asked, so this plan sees nothing
    assert "suffix" not in plan.resting
    assert "eagle" not in plan.resting


def test_a_row_with_a_wish_wakes_all_of_them() -> None:
    found, _ = machine(8, 3)
    plan = found.step([FakeRow(0, speculation="max"), *rows(7)], [])
    assert "suffix" not in plan.resting
    assert "eagle" not in plan.resting


def test_who_bets_on_one_wakes_that_one_alone() -> None:
    assert "suffix" in Off().plan(rows(2), [[], []], 8).resting
    assert "suffix" not in Fixed("suffix", Tree.chain(2)).plan(rows(2), [[], []], 8).resting
