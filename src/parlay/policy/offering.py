"""What simulated rows are offered, and what drafters must read for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from parlay.policy.server import BET, CONTEXT, OUT, READ, REQUEST, Server
from parlay.policy.trees import Ints
from parlay.policy.workload import Shown
from parlay.types import Offer


class Offering:
    """Trees that drafters can fill, with what they would have to read first, and guesses that were recorded.

    Args:
        offers: What could be bet on every row.
        server: Says which drafters take time to read, and how much they read.
        shown: See `Workload`; such a method offers what it showed.

    Attributes:
        readers: What each token that it has not read costs a method that must have read all of a row to guess for it.
    """

    def __init__(self, offers: Sequence[Offer], server: Server, shown: Mapping[str, Sequence[Shown]]) -> None:
        self._offers = [offer for offer in offers if offer.method not in shown]
        self._shown = list(shown.values())
        self._windows = server.windows
        costs = {offer.method: server.profile.draft(offer.method).per_catch_up for offer in self._offers}
        self.readers = {method: cost for method, cost in costs.items() if cost}

    def of(self, table: Ints, left: Ints) -> list[list[Offer]]:
        """What rows are offered.

        Args:
            table: [lines, rows] what is kept of each.
            left: [rows] known tokens that run; who has to read a row cannot guess before its prompt is in KV.
        """
        if not self.readers and not self._shown:
            return [self._offers] * len(left)
        unread = {method: self._unread(table, line, method) for line, method in enumerate(self.readers, READ)}
        found = []
        for row in range(len(left)):
            shown = [one[table[REQUEST, row]].offers[table[OUT, row]] for one in self._shown]
            trees = [
                replace(offer, catch_up=int(unread[offer.method][row])) if offer.method in unread else offer
                for offer in self._offers
                if offer.method not in unread or left[row] == 1
            ]
            found.append(trees + [offer for offer in shown if offer is not None])
        return found

    def read(self, table: Ints, methods: Sequence[str | None]) -> float:
        """Lets drafters read what they have missed of the rows that they guess for; returns the seconds it takes.

        Args:
            table: [lines, rows].
            methods: Of each bet, by its number.
        """
        seconds = 0.0
        for line, (method, cost) in enumerate(self.readers.items(), READ):
            mine = np.array([name == method for name in methods])[table[BET]]
            seconds += cost * float(self._unread(table, line, method)[mine].sum())
            table[line, mine] = table[CONTEXT, mine]
        return seconds

    def _unread(self, table: Ints, line: int, method: str) -> Ints:
        """[rows] tokens that a drafter would read of each."""
        missed, window = table[CONTEXT] - table[line], self._windows.get(method)
        return missed if window is None else np.where(missed > 2 * window, window, missed)
