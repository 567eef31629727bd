"""How much slower than its profile a machine runs now, learnt from every step."""

from __future__ import annotations

import bisect
import math

import numpy as np

from parlay.policy.trees import Floats

PER_OCTAVE = 2  # sizes of passes that are told apart
FIRST = 40  # passes of a size that its first one counts as: twice what all sizes together forget after


class LiveScale:
    """How much slower than its profile a part runs now, learnt from every step.

    The logarithm of measured over predicted time is followed by a moving average. What lies more than three spreads
    off counts as three, so that one hiccup moves nothing, while a machine that has become slower is believed after a
    few steps, as the spread grows with what it sees.

    Args:
        memory: Steps after which a change is believed by two thirds.
    """

    def __init__(self, memory: float = 20.0) -> None:
        self._rate = 1.0 / memory
        self._log = 0.0
        self._spread = 0.1  # of the logarithm

    @property
    def factor(self) -> float:
        return math.exp(self._log)

    @property
    def spread(self) -> float:
        """Standard deviation of the relative error of a prediction."""
        return self._spread

    def observe(self, predicted: float, measured: float) -> None:
        """Learns from a step; predicted is what the profile says, without the factor."""
        if predicted <= 0 or measured <= 0:
            return
        error = math.log(measured / predicted) - self._log
        limit = 3 * self._spread
        clipped = min(max(error, -limit), limit)
        self._log += self._rate * clipped
        # The mean absolute deviation of a normal variable is 0.8 of its standard deviation.
        self._spread = max(0.01, self._spread + self._rate * (1.25 * abs(clipped) - self._spread))


class LiveCurve:
    """How much slower than its profile a pass runs now, by its new tokens.

    What all passes have in common is followed within a few steps, as a machine becomes slower or faster for all of
    them. What is left at passes of about a size, in which the profile must be wrong, is learnt slowly and kept. Sizes
    that were never seen take after the nearest that were.

    Args:
        memory: Passes of a size after which an old one counts a third.
    """

    def __init__(self, memory: float = 400.0) -> None:
        self.scale = LiveScale()
        self._memory = memory
        self._seen: dict[int, tuple[int, float]] = {}  # size -> passes, and the logarithm that is left
        self._sizes, self._left = [0.0], [0.0]  # the same for interpolation

    @property
    def spread(self) -> float:
        """See `LiveScale`."""
        return self.scale.spread

    def factors(self, new: Floats) -> Floats:
        """Measured over profiled seconds of passes over so many new tokens. new: any shape."""
        left = np.interp(PER_OCTAVE * np.log2(np.maximum(new, 1)), self._sizes, self._left)
        return self.scale.factor * np.exp(left)

    def factor(self, new: int) -> float:
        """The same of one pass."""
        size, sizes, left = PER_OCTAVE * math.log2(max(new, 1)), self._sizes, self._left
        place = bisect.bisect_right(sizes, size)
        if 0 < place < len(sizes):
            share = (size - sizes[place - 1]) / (sizes[place] - sizes[place - 1])
            found = left[place - 1] + share * (left[place] - left[place - 1])
        else:
            found = left[0] if not place else left[-1]
        return self.scale.factor * math.exp(found)

    def observe(self, profiled: float, measured: float, new: int) -> None:
        """Learns from a pass over so many new tokens that should take so long by the profile."""
        if profiled <= 0 or measured <= 0:
            return
        size = round(PER_OCTAVE * math.log2(max(new, 1)))
        passes, left = self._seen.get(size, (0, 0.0))
        limit = 3 * self.spread
        error = math.log(measured / profiled) - left - math.log(self.scale.factor)
        self.scale.observe(profiled * math.exp(left), measured)
        left += min(max(error, -limit), limit) / min(passes + FIRST, self._memory)
        self._seen[size] = passes + 1, left
        self._sizes = sorted(map(float, self._seen))
        self._left = [self._seen[int(size)][1] for size in self._sizes]
