"""Bets on methods that are off, at a bounded price, so that off can end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parlay.policy.allocation import Allocation, Guesses
from parlay.policy.offers import MethodOffers
from parlay.policy.trees import Floats

WAIT = 64  # plans between two probes at least, since what they tell changes slowly
RISE = 1.1  # unless a method looks so much better than it did at its last one
GUESSES = 2  # enough to see whether the first guess is good and whether a second one is


@dataclass(frozen=True, slots=True)
class Probe:
    """A small bet in place of what a row would have bet.

    Attributes:
        method: Place of the method in the list.
        bought: Its guesses.
        row: Where.
        tokens: Expected, over those of the plan without it.
        seconds: The same of time.
    """

    method: int
    bought: Guesses
    row: int
    tokens: float
    seconds: float


class Prober:
    """Puts a share of the time by, and spends it on the method that has been off for longest.

    Args:
        share: Of the time of all steps.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = self._needed = 0.0  # seconds
        self._turn = 0
        self._plan = 0
        self._next = 0  # plan before which there is no other probe
        self._last: dict[str, int] = {}  # plan in which a method was last bet on
        self._looked: dict[str, float] = {}  # how good it looked at its last probe

    def save(self, seconds: float) -> None:
        """Puts something by, for a step that takes so long."""
        self._plan += 1
        self._credit += self._share * seconds

    def probe(
        self, methods: Sequence[MethodOffers], found: Allocation, seconds: Floats, price: float, fresh: bool
    ) -> Probe | None:
        """The probe that is due, if there was put enough by for one.

        Args:
            methods: What is offered.
            found: The plan without a probe.
            seconds: [budget + 1] of the step by guesses.
            price: Tokens that a second is worth.
            fresh: Whether all methods were looked at; there are no probes in other plans, where some could not be.
        """
        used = [len(bought.value) > 0 for bought in found.guesses]
        self.save(float(seconds[0]))
        self._last |= {method.method: self._plan for method, busy in zip(methods, used, strict=True) if busy}
        if not fresh or not self._share or self._credit < self._needed:
            return None
        waiting = self._plan < self._next
        idle = [
            place
            for place, method in enumerate(methods)
            if not used[place] and not (waiting and _looks(method) < RISE * self._looked.get(method.method, 1.0))
        ]
        idle.sort(key=lambda place: self._last.get(methods[place].method, 0))
        probes = (self._bet_on(place, methods, found, seconds, price) for place in idle)
        probe = next((some for some in probes if some is not None), None)
        if probe is None:
            return None
        cost = probe.seconds - probe.tokens / price
        self._credit = min(self._credit, max(2 * cost, float(seconds[0])))  # nothing is hoarded for later
        self._needed = cost
        if cost > self._credit:
            return None
        self._credit -= max(0.0, cost)
        self._needed, self._next = 0.0, self._plan + WAIT
        probed = methods[probe.method]
        self._last[probed.method], self._looked[probed.method] = self._plan, _looks(probed)
        return probe

    def _bet_on(
        self, place: int, methods: Sequence[MethodOffers], found: Allocation, seconds: Floats, price: float
    ) -> Probe | None:
        """Two guesses of this method on one of the rows where they cost least, lost bets included.

        Such rows take turns. The row where they look best would be the one whose acceptance is overestimated most, and
        what is learnt from such rows would make every method look worse than it is.
        """
        method, rows = methods[place], len(found.method)
        candidates = method.candidates
        lost, freed = np.zeros(rows), np.zeros(rows)
        for other, bought in zip(methods, found.guesses, strict=True):
            if len(bought.value):
                row = other.candidates.rows[bought.tree]
                lost += np.bincount(row, bought.value, rows)
                freed += np.bincount(row, minlength=rows)
        likely = candidates.worth(rows, 0.0, 0.0)[-1, candidates.rows]
        cost = lost[candidates.rows] + price * (candidates.own + method.catch_up)
        cheap = np.argsort(np.where(likely > 0, cost, np.inf), kind="stable")[: (np.count_nonzero(likely) + 1) // 2]
        if not len(cheap):
            return None
        self._turn += 1
        tree = int(cheap[self._turn % len(cheap)])
        row = int(candidates.rows[tree])
        some = candidates.chosen(np.arange(len(candidates.rows)) == tree, candidates.levels).of(slice(GUESSES))
        count = len(some.value)
        before = sum(len(bought.value) for bought in found.guesses)
        after = before - int(freed[row]) + count
        if not count or after >= len(seconds):
            return None
        time = (
            candidates.level_costs[some.depth.max()]
            + candidates.own[tree] + method.catch_up[tree]
            + candidates.cost.per_guess * count
            + seconds[after] - seconds[before]
        )  # fmt: skip
        return Probe(place, some, row, float(some.value.sum() - lost[row]), float(time))


def _looks(method: MethodOffers) -> float:
    """How likely its first guesses are accepted, requests of all groups alike."""
    return float(method.drafter.acceptance.matrices[:, 0, 0].mean())
