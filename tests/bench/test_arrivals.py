"""When requests are sent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from parlay.bench.arrivals import parse_rate, schedule


def test_rates() -> None:
    assert parse_rate("2.5") == 2.5
    assert parse_rate("inf") is None


@pytest.mark.parametrize("text", ["0", "-1", "fast", "", "nan"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="requests per second"):
        parse_rate(text)


def test_the_seed_fixes_the_schedule() -> None:
    assert schedule(3.0, 50, seed=1) == schedule(3.0, 50, seed=1)
    assert schedule(3.0, 50, seed=1) != schedule(3.0, 50, seed=2)


def test_gaps_are_exponential_with_the_mean_of_the_rate() -> None:
    times = schedule(4.0, 20_001, seed=5)
    gaps = np.array([later - earlier for earlier, later in pairwise(times)])
    assert times[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)  # four standard errors
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # as its mean: that of exponential gaps
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), abs=0.015)


def test_all_at_once() -> None:
    assert schedule(None, 3, seed=0) == [0.0, 0.0, 0.0]
    assert schedule(1.0, 1, seed=0) == [0.0]
