from __future__ import annotations

import math

import numpy as np
import pytest

from parlay.policy.live import LiveCurve, LiveScale


def test_a_slower_machine_is_believed_within_a_few_steps() -> None:
    scale, rng = LiveScale(), np.random.default_rng(0)
    for _ in range(200):
        scale.observe(0.02, 0.02 * rng.lognormal(0, 0.05))
    assert scale.factor == pytest.approx(1, abs=0.05)
    for _ in range(60):
        scale.observe(0.02, 0.05 * rng.lognormal(0, 0.05))
    assert scale.factor == pytest.approx(2.5, rel=0.1)


def test_a_hiccup_moves_little() -> None:
    scale = LiveScale()
    for _ in range(200):
        scale.observe(0.02, 0.02)
    scale.observe(0.02, 20.0)
    assert scale.factor < 1.01


def test_the_spread_is_that_of_steps() -> None:
    scale, rng = LiveScale(), np.random.default_rng(0)
    found = []
    for _ in range(3000):
        scale.observe(0.02, 0.02 * rng.lognormal(math.log(1.3), 0.08))
        found.append(scale.spread)
    assert np.mean(found[500:]) == pytest.approx(0.08, rel=0.1)


def test_what_took_no_time_teaches_nothing() -> None:
    scale = LiveScale()
    scale.observe(0.0, 1.0)
    scale.observe(1.0, 0.0)
    assert scale.factor == 1


def test_a_curve_learns_where_the_profile_is_wrong_and_keeps_it() -> None:
    """Passes over 8 tokens take half as long again as the profile says, all others what it says."""
    curve, rng = LiveCurve(), np.random.default_rng(0)

    def run(steps: int, slower: float = 1.0) -> None:
        for _ in range(steps):
            new = int(rng.choice([1, 2, 8, 32]))
            curve.observe(0.01, 0.01 * slower * rng.lognormal(0, 0.05) * (1.5 if new == 8 else 1.0), new)

    run(2000)
    assert curve.factor(8) == pytest.approx(1.5, rel=0.1)
    for size in (1, 2, 32, 500):
        assert curve.factor(size) == pytest.approx(1.0, rel=0.1)
    run(60, slower=3.0)  # is noticed for all sizes at once
    assert curve.factor(8) == pytest.approx(4.5, rel=0.2)
    assert curve.factors(np.array([1.0, 8.0, 32.0])) == pytest.approx([curve.factor(n) for n in (1, 8, 32)])
    assert curve.factor(32) == pytest.approx(3.0, rel=0.2)
