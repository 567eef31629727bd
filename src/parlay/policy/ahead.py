"""Whether to begin next tokens on other units (predictive pipelined decoding): what is won is time, not tokens.

All rows of a step begin theirs, or none does, since the target gives up half of its cores for it. What such a step
takes over a plain one was measured by the number of rows, and is corrected by those that are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from parlay.bets import Bet
from parlay.policy.base import PolicyRow
from parlay.policy.cost import DraftCost
from parlay.types import Offer

LATELY = 0.05  # what a new step counts
FORGET = 0.999  # of what was measured while serving, for every step without; a machine that was slow may be so no more


class HeadStart(NamedTuple):
    """A bet for every row, and what the step would take."""

    bet: Bet
    seconds: float


class Ahead:
    """Knows what steps take that begin the next token."""

    def __init__(self) -> None:
        self._factors: dict[str, float] = {}  # by method, measured while serving over measured before

    def best(
        self,
        rows: Sequence[PolicyRow],
        offers: Sequence[Sequence[Offer]],
        cost: Callable[[str], DraftCost],
        plain: float,
    ) -> HeadStart | None:
        """The method that every row was offered and whose steps take least; None where there is none.

        Args:
            rows: Of the step.
            offers: Per row, those that are `ahead`.
            cost: By method.
            plain: Seconds of the step without bets.
        """
        found: list[HeadStart] = []
        for offer in offers[0]:
            measured = cost(offer.method).ahead
            if measured and all(any(other.method == offer.method for other in some) for some in offers):
                counts, ratios = zip(*measured, strict=True)
                ratio = float(np.interp(len(rows), counts, ratios)) * self._factors.get(offer.method, 1.0)
                found.append(HeadStart(Bet(offer.method, offer.tree), ratio * plain))
        return min(found, key=lambda some: some.seconds, default=None)

    def observe(self, made: HeadStart, seconds: float) -> None:
        """Learns from a step that was made of it; not where the clock jumped."""
        if 0 <= seconds < math.inf:
            factor = self._factors.get(made.bet.method, 1.0)
            self._factors[made.bet.method] = factor * (1 + LATELY * (min(seconds / made.seconds, 4.0) - 1))

    def rest(self) -> None:
        """A step without."""
        self._factors = {method: factor**FORGET for method, factor in self._factors.items()}
