"""What a drafter's own word about its guesses is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parlay.policy.trees import Floats

LEAST = 1e-3  # confidence that is told apart from none
STEEPEST, FURTHEST = 10.0, 20.0  # that the curve may become


class ConfidenceCurve:
    """Turns a drafter's own confidence into a probability: sigmoid(a logit(confidence) + b), learnt while serving.

    Every step's outcomes are one Newton step of the logistic likelihood, in which old outcomes fade.

    Args:
        memory: Guesses after which an old one counts a third.
        trust: What the drafter's word weighs at first, in guesses.
    """

    def __init__(self, memory: float = 2000.0, trust: float = 10.0) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._weights = 1.0, 0.0  # a drafter is believed until it is shown to be wrong
        self._information, self._trust = (0.0, 0.0, 0.0), trust

    def __call__(self, confidence: Floats) -> Floats:
        slope, offset = self._weights
        return 1 / (1 + np.exp(-(slope * _logit(confidence) + offset)))

    def of(self, confidence: Sequence[float]) -> list[float]:
        """The same of a few, without NumPy's overhead."""
        slope, offset = self._weights
        odds = (min(max(some, LEAST), 1 - LEAST) for some in confidence)
        return [1 / (1 + math.exp(-(slope * math.log(p / (1 - p)) + offset))) for p in odds]

    def observe(self, confidence: Floats, accepted: NDArray[np.bool_]) -> None:
        """Learns from the guesses of a step that were tried. confidence, accepted: [guesses]."""
        slope, offset = self._weights
        x = _logit(confidence)
        p = 1 / (1 + np.exp(-(slope * x + offset)))
        doubt, surprise, keep = p * (1 - p), accepted - p, self._keep ** len(p)
        weighted = doubt * x
        xx, x1, one = self._information
        xx, x1, one = (
            keep * xx + float(weighted @ x),
            keep * x1 + float(weighted.sum()),
            keep * one + float(doubt.sum()),
        )
        self._information = xx, x1, one  # of a symmetric matrix of two rows
        # Where all guesses are accepted there is soon no doubt left, nor information: the prior keeps steps small.
        xx, one = xx + self._trust, one + self._trust
        gradient, total, size = float(surprise @ x), float(surprise.sum()), xx * one - x1 * x1
        slope += (one * gradient - x1 * total) / size
        offset += (xx * total - x1 * gradient) / size
        # What the drafter prefers is never worth less.
        self._weights = min(max(slope, 0.01), STEEPEST), min(max(offset, -FURTHEST), FURTHEST)


def _logit(probability: Floats) -> Floats:
    p = np.clip(np.asarray(probability, dtype=np.float64), LEAST, 1 - LEAST)
    return np.log(p / (1 - p))
