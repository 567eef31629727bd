"""What other choices would have taken, where that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parlay.policy.acceptance import MethodAcceptance, Trials
from parlay.policy.clock import Clock
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.hindsight import Decoded, regret, seconds_of_choices
from parlay.policy.offers import Drafter

PROFILE = Profile(
    "h",
    "m",
    "t",
    VerifyCost.linear(10.0, 1.0),
    {"d": DraftCost(per_level=2.0, per_guess=0.5)},
    HostCost(1.0, 0.25, 0.1),
)


def drafter(accepted: int, tried: int) -> Drafter:
    known = MethodAcceptance((accepted / tried, 0.0))
    for number in range(tried):
        won = ((0, 0),) if number < accepted else ()
        known.observe(1, Trials(((0, 0),), won))
    return Drafter("d", known)


def test_plain_steps_take_what_their_pass_and_host_take() -> None:
    found = seconds_of_choices(Clock(PROFILE), {}, {2: Decoded(5, 100, 20, 50.0), 1: Decoded(1, 10, 3, 9.0)})
    assert found == {"off": pytest.approx(10 * (10 + 2 + 1 + 0.5) + 3 * (10 + 1 + 1 + 0.25))}


def test_a_chain_takes_its_steps_over_what_it_earns() -> None:
    some = drafter(500, 1000)
    some.offered = 0.5
    found = seconds_of_choices(Clock(PROFILE), {"d": some}, {4: Decoded(10, 400, 120, 99.0)})
    p = some.acceptance.matrices[0, 0, 0]
    assert 0 < p < 1
    known = some.acceptance
    assert isinstance(known, MethodAcceptance)
    a, b = known.pool[:2, 0].tolist()
    step = (10 + 4 + 4) + (1 + 4 * 0.25 + 4 * 0.1) + (2 * 2 + 4 * 0.5)  # two of four rows have two guesses each
    assert found["d:2"] == pytest.approx(120 * step / (4 + 2 * (a + a * b)))
    assert set(found) == {"off", "d:1", "d:2", "d:3", "d:4", "d:6", "d:8"}


def test_rows_that_sample_take_longer() -> None:
    """Half of all rows, over the steps."""
    profile = replace(PROFILE, sampling=HostCost(0.5, 0.25), drawing={"d": DraftCost(per_level=1.0, per_guess=0.25)})
    decoded = {4: Decoded(10, 400, 120, 99.0, sampled=20)}
    some = drafter(500, 1000)
    plain, found = (seconds_of_choices(Clock(of), {"d": some}, decoded) for of in (PROFILE, profile))
    assert found["off"] - plain["off"] == pytest.approx(120 / 4 * (0.5 + 2 * 0.25))
    assert isinstance(some.acceptance, MethodAcceptance)
    emitted = 4 * (1 + some.acceptance.pool[0, 0])
    more = (0.5 + 2 * 0.25) + (1.0 + 2 * 0.25)  # two of the four guesses are drawn
    assert found["d:1"] - plain["d:1"] == pytest.approx(120 * more / emitted)


def test_methods_that_nothing_is_known_of_are_left_out() -> None:
    nothing = Drafter("d", MethodAcceptance())
    assert set(seconds_of_choices(Clock(PROFILE), {"d": nothing}, {1: Decoded(1, 1, 1, 1.0)})) == {"off"}


def test_regret_is_against_the_best() -> None:
    assert regret(11.0, [10.0, 20.0]) == pytest.approx(0.1)
    assert regret(8.0, [10.0]) == pytest.approx(-0.2)
