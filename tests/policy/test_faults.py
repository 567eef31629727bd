"""What goes wrong around the policy: it stays in its senses, recovers, and the log says what happened."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from parlay.bets import NO_TREE, Tree
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.types import Offer, RowResult, StepResult
from tests.policy.machine import Machine, guesses, rows

IDLE = VerifyCost((1, 16, 64, 256), (0.010, 0.011, 0.020, 0.080))
PROFILE = Profile("m", "m", "f", IDLE, {"draft_model": DraftCost(per_level=0.001)}, HostCost(per_row=1e-5))
OFFER = [Offer("draft_model", Tree.chain(6))]


@pytest.fixture
def machine(caplog: pytest.LogCaptureFixture) -> Iterator[Machine]:
    """One that has found out that betting pays."""
    caplog.set_level("INFO")
    machine = Machine(Goodput(PROFILE), {"draft_model": 0.8}, PROFILE)
    for _ in range(300):
        machine.step(rows(4), OFFER)
    assert betting(machine) > 8
    caplog.clear()
    yield machine
    assert math.isfinite(machine.policy.expected.seconds)  # pyright: ignore[reportAttributeAccessIssue]


def betting(machine: Machine, steps: int = 40) -> float:
    """Guesses per step lately."""
    return sum(guesses(machine.step(rows(4), OFFER)) for _ in range(steps)) / steps


def odd_step(machine: Machine, seconds: dict[str, float]) -> None:
    """A step with other times than it should have."""
    machine.policy.plan(rows(4), [OFFER] * 4, 256)
    machine.policy.observe(rows(4), StepResult((RowResult(None, NO_TREE, (), (0,)),) * 4, seconds))


@pytest.mark.parametrize("seconds", [-3600.0, math.inf, math.nan])
def test_a_clock_that_jumps_teaches_nothing(machine: Machine, seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    policy = machine.policy
    assert isinstance(policy, Goodput)
    before = policy.clock.learnt()
    for _ in range(3):
        odd_step(machine, {"verify": seconds, "accept": 0.001})
    assert policy.clock.learnt() == before
    assert "the clock jumped" in caplog.text
    assert betting(machine) > 8


def test_a_step_of_an_hour_changes_little(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """As when the machine slept."""
    policy = machine.policy
    assert isinstance(policy, Goodput)
    odd_step(machine, {"verify": 3600.0, "accept": 0.001})
    assert policy.clock.verify.scale.factor == pytest.approx(1, abs=0.1)
    assert caplog.text.count("a pass took 3.6e+03 s where") == 1
    assert betting(machine) > 8
    assert not policy.control.paused


def test_steps_that_are_a_hundred_times_slower_now_and_then(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    policy = machine.policy
    assert isinstance(policy, Goodput)
    for number in range(600):
        machine.slower = 100.0 if number % 20 == 7 else 1.0
        machine.step(rows(4), OFFER)
    machine.slower = 1.0
    assert betting(machine) > 8
    assert policy.clock.verify.scale.factor < 1.6
    assert 1 <= caplog.text.count("a pass took") <= 4, "a line now and then, not one each time"


def test_a_machine_that_stays_slower_is_told_and_believed(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    policy = machine.policy
    assert isinstance(policy, Goodput)
    machine.slower = 100.0
    for _ in range(400):
        machine.step(rows(4), OFFER)
    assert policy.clock.verify.factor(28) == pytest.approx(100, rel=0.1)
    assert "times as long as was measured at first" in caplog.text
    assert betting(machine) > 8, "what is slower by the same factor pays as before"
    machine.slower = 1.0
    for _ in range(400):
        machine.step(rows(4), OFFER)
    assert policy.clock.verify.factor(28) == pytest.approx(1, rel=0.25)
    assert betting(machine) > 8


def test_an_acceptance_that_collapses_ends_the_bets(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.accept = {"draft_model": 0.0}
    for _ in range(150):
        machine.step(rows(4), OFFER)
    assert betting(machine, 200) < 1, "of 24"
    assert "first guesses of draft_model are accepted, not" in caplog.text
    caplog.clear()
    machine.accept = {"draft_model": 0.9}
    for _ in range(2500):
        machine.step(rows(4), OFFER)
    assert betting(machine) > 8
    assert "first guesses of draft_model are accepted, not" in caplog.text


def test_a_drafter_that_always_agrees_is_bet_on_as_deep_as_it_goes_until_it_does_not(machine: Machine) -> None:
    machine.accept = {"draft_model": 1.0}
    for _ in range(300):
        machine.step(rows(4), OFFER)
    assert betting(machine) > 20, "of 24"
    machine.accept = {"draft_model": 0.0}
    machine.rate()
    for _ in range(400):
        machine.step(rows(4), OFFER)
    off = 4 / (float(PROFILE.verify(4, 4, 804)) + PROFILE.host(4, 0))
    assert machine.rate() > 0.9 * off, "it has paid for a while, not for ever"
    assert betting(machine, 200) < 1
