from __future__ import annotations

import logging

import numpy as np
import pytest

from parlay.policy.control import ENOUGH, LONGEST, SHORTEST, STEPS, Control


def test_plain_steps_cost_no_more_than_their_share() -> None:
    control, lost, plain = Control(0.005), 0.0, 0
    for _ in range(10_000):
        if control.due(0.010, 0.003):
            lost, plain = lost + 0.003, plain + 1
            control.observe(1, 1, 0, 0.010, 0.010)
    assert plain > 100
    assert lost <= 0.005 * 10_000 * 0.010 + 0.006


def test_they_come_often_where_they_cost_nothing_and_not_where_nothing_is_bet() -> None:
    control = Control(0.005)
    due = [control.due(0.010, 1e-6) for _ in range(100)]
    assert sum(due) > 50  # as long as no plain step was seen
    control.observe(1, 1, 0, 0.010, 0.010)
    assert not any(control.due(0.010, 1e-6) for _ in range(15))
    assert not any(control.due(0.010, 0.0) for _ in range(100))


def knowing() -> Control:
    """One that knows what plain steps take."""
    control = Control(0.005)
    for _ in range(ENOUGH):
        control.observe(4, 4, 0, 0.010, 0.010)
    return control


def bet(control: Control, gain: float, steps: int, seed: int = 0) -> None:
    """Steps of 4 rows whose bets save so much on average, with the noise of real ones."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        control.observe(int(4 + rng.binomial(8, 0.5)), 4, 8, 2 * (1 - gain) * 0.010, 0.010)


def test_bets_that_have_not_paid_pause_longer_each_time(caplog: pytest.LogCaptureFixture) -> None:
    control = knowing()
    with caplog.at_level(logging.INFO):
        bet(control, -0.2, STEPS)
    assert "bets have cost" in caplog.text
    for pause in (SHORTEST, 2 * SHORTEST):
        assert control.paused
        for _ in range(pause):
            control.due(0.010, 0.0)
        assert not control.paused
        bet(control, -0.2, STEPS)
    for _ in range(10):
        for _ in range(LONGEST):
            control.due(0.010, 0.0)
        assert not control.paused
        bet(control, -0.2, STEPS)


@pytest.mark.parametrize("seed", range(5))
def test_bets_that_pay_go_on(seed: int) -> None:
    control = knowing()
    bet(control, 0.2, 20 * STEPS, seed)
    assert not control.paused
    assert control.gain == pytest.approx(0.2 * 2, abs=0.15)


def test_a_profile_that_is_wrong_about_plain_steps_is_seen_through() -> None:
    """It says 8 ms where plain steps take 10, and so bets seem to lose that pay."""
    control = Control(0.005)
    for _ in range(200):
        control.observe(4, 4, 0, 0.010, 0.008)
        control.observe(8, 4, 8, 0.018, 0.008)
    assert not control.paused
    assert control.gain > 0.05
