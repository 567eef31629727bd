"""Predictions hold for rows that sample as for others, and what is learnt of one is not held against the other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parlay.bets import Tree
from parlay.policy.clock import Clock, Load
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.types import Offer
from tests.policy.machine import FakeRow, Machine, guesses

PROFILE = Profile(
    "m", "m", "f", VerifyCost((1, 64), (0.010, 0.020)), {"eagle": DraftCost(per_level=0.0005), "suffix": DraftCost()},
    HostCost(0.0005, 1e-5), sampling=HostCost(2e-4, 1e-4),
    drawing={"eagle": DraftCost(per_level=0.0002, per_guess=0.0001)},
    choosing=DraftCost(per_step=0.0005, per_row=0.0001, per_guess=0.0002),
)  # fmt: skip


def rows(count: int, sampled: int) -> list[FakeRow]:
    return [FakeRow(seq, is_greedy=seq >= sampled) for seq in range(count)]


def test_rows_that_sample_pay_for_what_they_draw() -> None:
    clock = Clock(PROFILE)
    assert clock.draft("eagle")(3, 1, 8, 0) == pytest.approx(0.0015)
    assert clock.draft("eagle", 1.0)(3, 1, 8, 0) == pytest.approx(0.0015 + 0.0006 + 0.0008 + 0.0006 + 0.0016)
    one_of_four = clock.draft("eagle")(3, 4, 32, 0) + 0.0006 + 0.0008 + 0.0006 + 0.0016
    assert clock.draft("eagle", 0.25)(3, 4, 32, 0) == pytest.approx(one_of_four)
    assert clock.draft("suffix", 1.0) == clock.draft("suffix"), "its guesses are not drawn"
    plain, sampled = (clock.seconds(Load(4, 4, 800, some), 0)[0] for some in (0, 4))
    assert sampled - plain == pytest.approx(6e-4)


@pytest.mark.parametrize("sampled", [0, 3, 6])
def test_steps_that_take_what_was_measured_teach_nothing_new(sampled: int) -> None:
    policy = Goodput(PROFILE)
    machine = Machine(policy, {"eagle": 0.8}, PROFILE)
    for _ in range(150):
        before = machine.seconds
        machine.step(rows(6, sampled), [Offer("eagle", Tree.chain(4))])
        assert policy.expected.seconds == pytest.approx(machine.seconds - before, rel=0.05)
    assert machine.tokens > 8 * 150, "bets were made"
    assert policy.clock.host.factor == pytest.approx(1.0, abs=0.01)
    assert policy.clock.drafting.factor == pytest.approx(1.0, abs=0.01)


def test_what_is_drawn_is_bet_on_less() -> None:
    """And as much as ever where it costs nothing to draw."""
    bets = {}
    for profile in (PROFILE, replace(PROFILE, drawing={})):
        for sampled in (0, 6):
            machine = Machine(Goodput(profile), {"eagle": 0.5}, profile)
            plans = [machine.step(rows(6, sampled), [Offer("eagle", Tree.chain(4))]) for _ in range(200)]
            bets[bool(profile.drawing), sampled] = sum(map(guesses, plans[100:]))
    assert bets[True, 6] < 0.7 * bets[True, 0]
    assert bets[False, 6] > 0.8 * bets[False, 0]


def test_what_was_learnt_holds_for_all_parts() -> None:
    clock = Clock(PROFILE)
    clock.host.observe(1.0, 1.1)
    clock.drafting.observe(1.0, 1.1)
    learnt = clock.learnt()
    assert learnt.choosing.per_guess == pytest.approx(clock.host.factor * PROFILE.choosing.per_guess)
    assert learnt.drawing["eagle"].per_guess == pytest.approx(clock.drafting.factor * 0.0001)
    assert learnt.sampling.per_row == pytest.approx(clock.host.factor * 1e-4)
