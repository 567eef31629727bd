from __future__ import annotations

import numpy as np
import pytest

from parlay.policy.confidence import ConfidenceCurve


@pytest.mark.parametrize("confidence", [0.999, 0.5])
def test_a_rejection_after_a_long_run_of_accepted_guesses_breaks_nothing(confidence: float) -> None:
    curve, words = ConfidenceCurve(), np.full(8, confidence)
    for _ in range(10_000):
        curve.observe(words, np.ones(8, dtype=bool))
    assert curve.of([confidence])[0] > 0.99
    for _ in range(300):
        curve.observe(words, np.arange(8) < 4)
    (found,) = curve.of([confidence])
    assert found == pytest.approx(float(curve(np.array([confidence]))[0]))
    assert 0.3 < found < 0.9
