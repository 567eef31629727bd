"""What a step costs, in seconds: profiles as they are saved, and how they are fitted.

T = verify(rows, new tokens, context tokens) + draft(levels, rows, guesses, context tokens) for every active drafter
+ host(rows, guesses), and more of the last two where tokens are sampled. SmartSpec (arXiv 2406.14066) has the same
linear terms; here the term in new tokens is a curve through knots, since real passes cost a staircase, and no
coefficient is negative, since more work never takes less time (the published coefficients, fitted without that, charge
less for more rows).
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from parlay.policy.trees import Floats, Ints


@dataclass(frozen=True, slots=True)
class VerifyCost:
    """One pass of the target.

    Attributes:
        knots: Numbers of new tokens, rising.
        seconds: What a pass over so many takes, before rows and context. Between knots and beyond the last one it goes
            along lines; fewer tokens than the first take as long as it.
        per_row: Seconds for every row.
        per_context: Seconds for every token in KV that is attended to.
        per_pair: Seconds for every new token and every token in KV of its row.

    The rest may be below 0, as regressions of others have it; a pass takes no less than `seconds` begins with.
    """

    knots: tuple[int, ...]
    seconds: tuple[float, ...]
    per_row: float = 0.0
    per_context: float = 0.0
    per_pair: float = 0.0

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.seconds):
            raise ValueError("knots, seconds: must be equally many, and at least one")
        if any(a >= b for a, b in itertools.pairwise(self.knots)):
            raise ValueError("knots: must rise")
        rest = self.per_row, self.per_context, self.per_pair
        if not all(map(math.isfinite, (*self.seconds, *rest))) or self.seconds[0] < 0:
            raise ValueError("seconds, per_row, per_context, per_pair: must be finite, and seconds not negative")

    @classmethod
    def linear(cls, fixed: float, per_token: float, per_row: float = 0.0, per_context: float = 0.0) -> VerifyCost:
        return cls((0, 1), (fixed, fixed + per_token), per_row, per_context)

    def __call__(self, new: Floats | Ints | float, rows: float, context: Floats | Ints | float) -> Floats:
        """Seconds of a pass over so many new tokens (any shape) of so many rows with so much context in all."""
        n = np.asarray(new, dtype=np.float64)
        knots, seconds = self.knots, self.seconds
        curve = np.interp(n, knots, seconds)
        if len(knots) > 1:
            slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2])
            curve = curve + slope * np.maximum(0.0, n - knots[-1])
        attention = (self.per_context + self.per_pair / max(rows, 1) * n) * context
        return np.maximum(curve + self.per_row * rows + attention, seconds[0])

    def at(self, new: int, rows: int, context: int) -> float:
        """The same for one pass, without NumPy's overhead."""
        knots, seconds = self.knots, self.seconds
        place = min(bisect.bisect_right(knots, new), len(knots) - 1)
        if new <= knots[0] or not place:
            curve = seconds[0]
        else:
            share = (new - knots[place - 1]) / (knots[place] - knots[place - 1])
            curve = seconds[place - 1] + share * (seconds[place] - seconds[place - 1])
        attention = (self.per_context + self.per_pair / max(rows, 1) * new) * context
        return max(curve + self.per_row * rows + attention, seconds[0])


@dataclass(frozen=True, slots=True)
class DraftCost:
    """A drafter's part of a step in which it is used; zero for guesses that cost next to nothing.

    Attributes:
        per_step: Seconds once a step.
        per_level: Seconds for every level of guesses, whatever its width.
        per_row: Seconds for every row it guesses for.
        per_guess: Seconds for every guess.
        per_context: Seconds for every token in the KV of those rows.
        per_catch_up: Seconds for every known token that it has not read yet.
        ahead: Of one that begins next tokens, by rows: seconds of such a step over those of a plain one.
    """

    per_step: float = 0.0
    per_level: float = 0.0
    per_row: float = 0.0
    per_guess: float = 0.0
    per_context: float = 0.0
    per_catch_up: float = 0.0
    ahead: tuple[tuple[int, float], ...] = ()

    def __call__(self, levels: float, rows: float, guesses: float, context: float) -> float:
        fixed = self.per_step + self.per_level * levels
        return fixed + self.per_row * rows + self.per_guess * guesses + self.per_context * context

    def scaled(self, factor: float) -> DraftCost:
        """The same on a machine that is so much slower."""
        return DraftCost(
            factor * self.per_step,
            factor * self.per_level,
            factor * self.per_row,
            factor * self.per_guess,
            factor * self.per_context,
            factor * self.per_catch_up,
            self.ahead,
        )

    def shared(self, share: float) -> DraftCost:
        """The same for such a share of the rows; a step or a level takes as long for one row as for many."""
        return replace(
            self, per_row=share * self.per_row, per_guess=share * self.per_guess, per_context=share * self.per_context
        )

    def __add__(self, more: DraftCost) -> DraftCost:
        return DraftCost(
            self.per_step + more.per_step,
            self.per_level + more.per_level,
            self.per_row + more.per_row,
            self.per_guess + more.per_guess,
            self.per_context + more.per_context,
            self.per_catch_up + more.per_catch_up,
            self.ahead,
        )


N = TypeVar("N", float, Floats)


@dataclass(frozen=True, slots=True)
class HostCost:
    """Scheduling, choosing and committing tokens, detokenising.

    Attributes:
        per_step: Seconds once a step.
        per_row: Seconds for every row.
        per_guess: Seconds for every guess.
    """

    per_step: float = 0.0
    per_row: float = 0.0
    per_guess: float = 0.0

    def scaled(self, factor: float) -> HostCost:
        """The same on a machine that is so much slower."""
        return HostCost(factor * self.per_step, factor * self.per_row, factor * self.per_guess)

    def __call__(self, rows: float, guesses: N) -> N:
        return self.per_guess * guesses + (self.per_step + self.per_row * rows)


@dataclass(frozen=True, slots=True)
class Profile:
    """The measured costs of one model on one machine, as a readable file.

    Attributes:
        hardware: What ran it.
        model: What was run.
        dtype: In which type.
        verify: The target's pass.
        drafts: Drafters by method.
        host: The rest.
        sampling: What it takes more for rows that sample; those with a seed, which choose otherwise, count as well.
        drawing: By method, what guessing takes more for such rows, of methods that then draw their guesses.
        choosing: What choosing among drawn guesses takes, a part of the host's.
        notes: Where the numbers come from.
    """

    hardware: str
    model: str
    dtype: str
    verify: VerifyCost
    drafts: Mapping[str, DraftCost] = field(default_factory=dict)
    host: HostCost = HostCost()
    sampling: HostCost = HostCost()
    drawing: Mapping[str, DraftCost] = field(default_factory=dict)
    choosing: DraftCost = DraftCost()
    notes: str = ""

    @property
    def key(self) -> str:
        """What a stored profile is found by."""
        return f"{self.hardware} {self.model} {self.dtype}"

    def draft(self, method: str) -> DraftCost:
        """Of a drafter that the profile does not know: nothing."""
        return self.drafts.get(method, DraftCost())

    def around(self, rows: float, guesses: N, sampled: float) -> N:
        """Seconds of the host without choosing among drawn guesses.

        Args:
            rows: All of them.
            guesses: Of all rows; any shape.
            sampled: Rows that sample.
        """
        return self.host(rows, guesses) + (self.sampling(sampled, 0.0) if sampled else 0.0)

    def sampled(self, method: str) -> tuple[DraftCost, DraftCost]:
        """What betting on rows that sample takes more: drawing guesses, and choosing among them."""
        drawing = self.drawing.get(method)
        return (DraftCost(), DraftCost()) if drawing is None else (drawing, self.choosing)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> Profile:
        """From what `dataclasses.asdict` makes of one.

        Raises:
            ValueError: for anything else, or some other error.
        """
        found = dict(written)
        verify = found.pop("verify")
        curve = VerifyCost(**{**verify, "knots": tuple(verify["knots"]), "seconds": tuple(verify["seconds"])})
        drafts, drawing = (
            {name: _draft_cost(cost) for name, cost in found.pop(part, {}).items()} for part in ("drafts", "drawing")
        )
        host, sampling = (HostCost(**found.pop(part, {})) for part in ("host", "sampling"))
        choosing = _draft_cost(found.pop("choosing", {}))
        return cls(
            **found, verify=curve, drafts=drafts, host=host, sampling=sampling, drawing=drawing, choosing=choosing
        )

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads what `save` wrote.

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # the first is JSON's and Unicode's, too
            raise ValueError(f"{path} is not a profile: {error}") from error


def _draft_cost(written: Mapping[str, Any]) -> DraftCost:
    return DraftCost(**{**written, "ahead": tuple(map(tuple, written.get("ahead", ())))})


# ---- fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted pass and its relative errors on what it was fitted to, or on shapes that were held out."""

    cost: VerifyCost
    median_error: float
    worst_error: float


def fit_verify(new: Ints, rows: Ints, context: Ints, seconds: Floats, knots: Sequence[int]) -> Fit:
    """Fits a pass to measurements, one per entry: least squares of the relative error, no coefficient negative.

    The curve through the knots is written as a sum of rising parts, one between every two knots, so that coefficients
    that are not negative make it one that never falls.
    """
    knots = sorted({0, *knots})
    parts = [np.ones(len(new))]
    for low, high in itertools.pairwise(knots):
        top = np.inf if high == knots[-1] else 1.0
        parts.append(np.clip((new - low) / (high - low), 0.0, top))
    features = np.stack([*parts, rows, context, new * context / rows], axis=1) / seconds[:, None]
    *steps, per_row, per_context, per_pair = map(float, nonnegative_least_squares(features, np.ones(len(seconds))))
    cost = VerifyCost(tuple(knots), tuple(np.cumsum(steps).tolist()), per_row, per_context, per_pair)
    return Fit(cost, *relative_errors(cost, new, rows, context, seconds))


def relative_errors(cost: VerifyCost, new: Ints, rows: Ints, context: Ints, seconds: Floats) -> tuple[float, float]:
    """Median and worst of |predicted / measured - 1|."""
    predicted = np.array([float(cost(*shape)) for shape in zip(new, rows, context, strict=True)])
    error = np.abs(predicted / seconds - 1)
    return float(np.median(error)), float(error.max())


def nonnegative_least_squares(a: Floats, b: Floats) -> Floats:
    """argmin |a x - b| over x >= 0, by the active-set method of Lawson and Hanson (1974, Chapter 23).

    Args:
        a: [equations, unknowns].
        b: [equations].
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale  # columns in very different units
    free = np.zeros(a.shape[1], dtype=bool)
    x = np.zeros(a.shape[1])
    for _ in range(3 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        candidates = np.where(free, -np.inf, gradient)
        if candidates.max() <= 1e-10 * np.linalg.norm(b):
            break
        free[np.argmax(candidates)] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            falling = free & (trial <= 0)
            step = np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300))
            x = x + step * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = trial
    return x / scale
