"""Speculation length by batch size (Su et al. 2023, arXiv 2310.18813): the model, its fits, and the table.

With b requests and s guesses each, a round takes T(b, s) and emits l(s) + 1 tokens per request. The best length
minimises T(b, s) / (l(s) + 1); as a pass costs more for every guess the more requests there are, it falls with b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parlay.policy.trees import Floats

Accepted = Callable[[Floats], Floats]  # guesses -> expected number accepted


@dataclass(frozen=True, slots=True)
class AcceptedLength:
    """l(s), fitted to measurements.

    Attributes:
        form: "power law" (c s^g) or "independent" (a (1 - a^s) / (1 - a), each guess accepted with probability a).
        parameters: c and g, or a alone.
        error: Root of the mean square of its differences from the measurements, in tokens.
        worst: The largest of them.
    """

    form: str
    parameters: tuple[float, ...]
    error: float
    worst: float

    def __call__(self, guesses: Floats) -> Floats:
        return _FORMS[self.form](np.asarray(guesses, dtype=np.float64), *self.parameters)


def power_law(guesses: Floats, c: float, g: float) -> Floats:
    """c s^g, the paper's form; it goes on rising where independent guesses would have saturated."""
    return np.where(guesses > 0, c * np.maximum(guesses, 1e-300) ** g, 0.0)


def independent(guesses: Floats, a: float) -> Floats:
    """a + a^2 + ... + a^s."""
    return guesses * 1.0 if a >= 1 else a * (1 - a**guesses) / (1 - a)


_FORMS: Mapping[str, Callable[..., Floats]] = {"power law": power_law, "independent": independent}


def fit_power_law(guesses: Floats, accepted: Floats) -> AcceptedLength:
    """The least-squares power law; for every g the best c is known, so g is all that is searched."""

    def scaled(g: float) -> tuple[float, float]:
        shape = power_law(guesses, 1.0, g)
        return float(shape @ accepted / (shape @ shape)), g

    return _best("power law", guesses, accepted, scaled, 0.0, 1.5)


def fit_independent(guesses: Floats, accepted: Floats) -> AcceptedLength:
    """The least-squares length of guesses that are accepted independently of each other."""
    return _best("independent", guesses, accepted, lambda a: (a,), 0.0, 1.0)


def _best(
    form: str,
    guesses: Floats,
    accepted: Floats,
    parameters: Callable[[float], tuple[float, ...]],
    low: float,
    high: float,
) -> AcceptedLength:
    """Narrows a grid over the one parameter that is searched."""
    guesses, accepted = np.asarray(guesses, dtype=np.float64), np.asarray(accepted, dtype=np.float64)
    if len(guesses) == 0 or guesses.shape != accepted.shape or (guesses <= 0).any():
        raise ValueError("accepted lengths are fitted to one or more measurements with a guess or more each")

    def differences(value: float) -> Floats:
        return _FORMS[form](guesses, *parameters(value)) - accepted

    value = low
    for _ in range(6):
        grid = np.linspace(low, high, 41)
        best = int(np.argmin([float(np.square(differences(value)).sum()) for value in grid]))
        value, low, high = float(grid[best]), grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    error = np.abs(differences(value))
    return AcceptedLength(form, parameters(value), float(np.sqrt(np.mean(error**2))), float(error.max()))


def fit_lines(guesses: Floats, seconds: Mapping[int, Floats]) -> dict[int, tuple[float, float, float]]:
    """By batch size: seconds per guess, seconds without any, and R^2 of the line through the measured passes."""
    lines = {}
    for batch, measured in seconds.items():
        slope, start = np.polyfit(guesses, measured, 1)
        spread = float(np.square(measured - np.mean(measured)).sum())
        left = float(np.square(measured - (start + slope * np.asarray(guesses))).sum())
        lines[batch] = float(slope), float(start), 1 - left / spread if spread else 1.0
    return lines


def token_time(
    batch: int, guesses: Floats, accepted: Accepted, verify: Callable[[int, Floats], Floats], draft: float
) -> Floats:
    """J(b, s): seconds per emitted token of one request.

    Args:
        batch: b.
        guesses: s, any shape; 0 is plain decoding.
        accepted: l.
        verify: Seconds of a pass by batch size and guesses.
        draft: Seconds of one draft step of this batch.
    """
    guesses = np.asarray(guesses, dtype=np.float64)
    return (verify(batch, guesses) + guesses * draft) / (accepted(guesses) + 1)


def best_length(
    batch: int, longest: int, accepted: Accepted, verify: Callable[[int, Floats], Floats], draft: float
) -> int:
    """s_opt(b) among 0 .. longest; all are looked at, since a pass costs a staircase."""
    return int(np.argmin(token_time(batch, np.arange(longest + 1.0), accepted, verify, draft)))


def regret(measured: Sequence[float] | Floats, chosen: int) -> float:
    """How much more time per token the chosen length takes than the best measured one: 0.05 is 5% more.

    Args:
        measured: Seconds per token by length, from 0 on.
        chosen: The length that a model chose.
    """
    return float(measured[chosen] / np.min(measured) - 1)


class LengthTable:
    """The length for every batch size, from those that were profiled.

    A batch size in between takes the length of the next larger one, which is the shorter where lengths fall; one beyond
    the largest takes that of the largest.

    Args:
        lengths: By profiled batch size.
    """

    def __init__(self, lengths: Mapping[int, int]) -> None:
        if not lengths or min(lengths) < 1 or min(lengths.values()) < 0:
            raise ValueError("a table needs batch sizes from 1 on, and lengths from 0 on")
        self.lengths = dict(sorted(lengths.items()))
        self._batches = np.array(list(self.lengths))
        self._values = list(self.lengths.values())

    @classmethod
    def measured(cls, seconds: Mapping[int, Sequence[float]]) -> LengthTable:
        """From seconds per token by batch size and length (from 0 on)."""
        return cls({batch: int(np.argmin(line)) for batch, line in seconds.items()})

    def __getitem__(self, batch: int) -> int:
        return self._values[min(int(np.searchsorted(self._batches, batch)), len(self._values) - 1)]

    def bands(self) -> list[tuple[int, int | None, int]]:
        """First and last batch size (None: no limit) of every run of equal lengths, and the length."""
        bands: list[tuple[int, int | None, int]] = []
        first = 1
        for batch, length in self.lengths.items():
            if bands and bands[-1][2] == length:
                bands[-1] = (bands[-1][0], batch, length)
            else:
                bands.append((first, batch, length))
            first = batch + 1
        start, _, length = bands[-1]
        return [*bands[:-1], (start, None, length)]
