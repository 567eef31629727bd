"""Bets on methods that are off, at a bounded price, so that off can end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parlay.policy.allocation import Allocation, Guesses
from parlay.policy.offers import MethodOffers
from parlay.policy.trees import Floats

WAIT = 48  # plans between two probes at least, since what they tell changes slowly
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
        self._wait = 0  # plans until it looks again
        self._idle: dict[str, int] = {}  # plans since a method was last bet on

    def probe(self, methods: Sequence[MethodOffers], found: Allocation, seconds: Floats, price: float) -> Probe | None:
        """The probe that is due, if there was put enough by for one.

        Args:
            methods: What is offered.
            found: The plan without a probe.
            seconds: [budget + 1] of the step by guesses.
            price: Tokens that a second is worth.
        """
        used = [len(bought.value) > 0 for bought in found.guesses]
        for method, busy in zip(methods, used, strict=True):
            self._idle[method.method] = 0 if busy else self._idle.get(method.method, 0) + 1
        self._credit += self._share * float(seconds[0])
        idle = [place for place, method in enumerate(methods) if not used[place]]
        self._wait -= 1
        if not idle or not self._share or self._wait > 0 or self._credit < self._needed:
            return None
        idle.sort(key=lambda place: -self._idle[methods[place].method])
        probes = (self._bet_on(place, methods, found, seconds, price) for place in idle)
        probe = next((some for some in probes if some is not None), None)
        if probe is None:
            self._wait = WAIT
            return None
        cost = probe.seconds - probe.tokens / price
        self._credit = min(self._credit, max(2 * cost, float(seconds[0])))  # nothing is hoarded for later
        self._needed = cost
        if cost > self._credit:
            return None
        self._credit -= max(0.0, cost)
        self._needed, self._wait = 0.0, WAIT
        self._idle[methods[probe.method].method] = 0
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
