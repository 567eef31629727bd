from __future__ import annotations

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.base import Policy
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.fixed import Fixed, Off, Synergy
from parlay.policy.smartspec import SmartSpec
from parlay.types import Offer
from tests.policy.machine import FakeRow, Machine, guesses, rows

IDLE = VerifyCost((1, 16, 64, 256), (0.010, 0.011, 0.020, 0.080))
PROFILE = Profile("m", "m", "f", IDLE, {"draft_model": DraftCost(per_level=0.0005)}, HostCost(per_row=1e-5))
CHAIN = Offer("draft_model", Tree.chain(8))


def lengths(policy: Policy, count: int) -> set[int]:
    plan = policy.plan(rows(count), [[CHAIN]] * count, 1000)
    return {0 if bet is None else len(bet.tree) for bet in plan.bets}


def test_off_and_fixed() -> None:
    assert lengths(Off(), 3) == {0}
    assert lengths(Fixed("draft_model", Tree.chain(3)), 3) == {3}
    assert lengths(Fixed("another", Tree.chain(3)), 3) == {0}


def test_a_fixed_bet_stays_within_the_offer_the_depth_and_the_budget() -> None:
    policy = Fixed("draft_model", Tree.chain(5))
    some = [FakeRow(0), FakeRow(1, max_depth=2), FakeRow(2), FakeRow(3)]
    offers = [[Offer("draft_model", Tree.chain(3))], [CHAIN], [CHAIN], [CHAIN]]
    plan = policy.plan(some, offers, 8)
    assert [0 if bet is None else len(bet.tree) for bet in plan.bets] == [3, 2, 3, 0]


def test_a_length_by_batch_size() -> None:
    policy = Synergy("draft_model", {1: 6, 4: 3, 16: 0})
    assert [lengths(policy, count) for count in (1, 2, 4, 5, 40)] == [{6}, {3}, {3}, {0}, {0}]
    prompts = [FakeRow(seq, count=50, samples=False) for seq in range(9)]
    plan = policy.plan([FakeRow(99), *prompts], [[CHAIN], *[[]] * 9], 100)
    assert guesses(plan) == 6  # only rows that emit something count


@pytest.mark.parametrize("accept", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("count", [1, 8, 48])
def test_smartspec_is_near_the_best_length(accept: float, count: int) -> None:
    machine = Machine(SmartSpec(PROFILE, "draft_model"), {"draft_model": accept}, PROFILE)
    for _ in range(200):
        machine.step(rows(count), [CHAIN], 1000)
    machine.rate()
    for _ in range(400):
        machine.step(rows(count), [CHAIN], 1000)

    def expected(length: int) -> float:
        emitted = count * trees.expected_emitted(Tree.chain(length), np.array([accept]))
        new = count * (length + 1)
        seconds = float(IDLE(new, count, 0)) + count * 1e-5 + 0.0005 * length
        return emitted / seconds

    assert machine.rate() > 0.9 * max(expected(length) for length in range(9))  # its margin for no guess is 10%


def test_smartspec_estimates_acceptance_without_bias() -> None:
    policy = SmartSpec(PROFILE, "draft_model")
    machine = Machine(policy, {"draft_model": 0.8}, PROFILE)
    for _ in range(400):
        machine.step(rows(4), [CHAIN])
    assert policy.acceptance == pytest.approx(0.8, abs=0.06)


def test_smartspec_comes_back_from_no_guess() -> None:
    policy = SmartSpec(PROFILE, "draft_model", probe_every=3)
    machine = Machine(policy, {"draft_model": 0.02}, PROFILE)
    for _ in range(2000):
        machine.step(rows(4), [CHAIN])
    assert policy.length == 0
    machine.accept = {"draft_model": 0.9}
    for _ in range(6000):
        machine.step(rows(4), [CHAIN])
    assert policy.length > 0


def test_smartspec_with_certain_guesses_and_without_offers() -> None:
    policy = SmartSpec(PROFILE, "draft_model")
    policy.acceptance = 1.0
    assert lengths(policy, 1) == {8}
    assert SmartSpec(PROFILE, "draft_model").plan(rows(2), [[], []], 10).bets == (None, None)
    assert SmartSpec(PROFILE, "draft_model").plan([], [], 10).bets == ()
