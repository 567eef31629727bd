"""How much of each row a drafter's own pages hold.

A drafter's pool has the target's page numbers, so that prefix reuse, preemption and rollback carry it. But it is off at
times, and then the target's pages change without it. What it wrote on a page is marked there: the text that it wrote
and a fingerprint of everything before. Marks outlive rows, as pages do. A wrong mark could only spoil guesses.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from parlay.types import Row


@dataclass(slots=True)
class _Held:
    """One row as it was seen last."""

    filled: int = 0
    first: int = 0  # page; those before it are not wanted
    pages: list[int] = field(default_factory=list)  # those of tokens[:filled]
    prints: list[int] = field(default_factory=lambda: [0])  # of everything before page i


class Coverage:
    """Marks on pages, and what they mean for each row.

    Args:
        page_size: Positions per page.
    """

    def __init__(self, page_size: int) -> None:
        self._size = page_size
        self._marks: dict[int, tuple[int, array[int]]] = {}  # page -> fingerprint before it, tokens on it
        self._rows: dict[int, _Held] = {}
        self._trusted: set[int] = set()  # rows that nobody can have taken pages from since they were looked at

    def of(self, row: Row) -> int:
        """So many of the row's tokens are there."""
        held = self._rows.setdefault(row.seq, _Held())
        count = len(held.pages)
        if row.seq not in self._trusted or row.pages[:count] != held.pages:
            held.filled = self._walk(row, held)
            held.pages = row.pages[: -(-held.filled // self._size)]
            self._trusted.add(row.seq)
        return held.filled

    def first_page(self, row: Row) -> int:
        """Pages of the row before this one are not wanted."""
        held = self._rows.get(row.seq)
        return 0 if held is None else held.first

    def leave_out(self, row: Row, page: int) -> None:
        """The row's pages before this one will never be read; what is there of the others does not count either."""
        held = self._rows[row.seq]
        held.first, held.filled, held.pages = page, page * self._size, row.pages[:page]

    def end_step(self, rows: Sequence[Row]) -> None:
        """These rows ran. One that did not may come back with the same pages, which had served others meanwhile."""
        self._trusted.intersection_update(row.seq for row in rows)

    def wrote(self, row: Row, end: int, guesses: int = 0) -> None:
        """The row's tokens up to `end` are there now; so many guesses were written behind its known tokens."""
        size, held = self._size, self._rows[row.seq]
        for index in range(held.filled // size, -(-end // size)):
            tokens = row.tokens[index * size : min(end, (index + 1) * size)]
            self._marks[row.pages[index]] = self._print(row, held, index), tokens
        held.filled, held.pages = end, row.pages[: -(-end // size)]
        for page in row.pages[-(-end // size) : -(-(row.length + guesses) // size)]:
            self._marks.pop(page, None)

    def forget(self, seq: int) -> None:
        """A row has ended; its pages may serve others."""
        self._rows.pop(seq, None)

    def _walk(self, row: Row, held: _Held) -> int:
        for index, page in enumerate(row.pages[held.first : -(-row.length // self._size)], start=held.first):
            before, tokens = self._marks.get(page, (None, array("i")))
            here = row.tokens[index * self._size : min(row.length, (index + 1) * self._size)]
            same = 0
            if before == self._print(row, held, index):
                same = next((i for i, (a, b) in enumerate(zip(here, tokens, strict=False)) if a != b), len(tokens))
            if same < self._size:
                return index * self._size + min(same, len(here))
        return row.length

    def _print(self, row: Row, held: _Held, index: int) -> int:
        """Fingerprint of the tokens before a page; a row's known tokens never change, so neither does it."""
        while len(held.prints) <= index:
            start = (len(held.prints) - 1) * self._size
            held.prints.append(hash((held.prints[-1], row.tokens[start : start + self._size].tobytes())))
        return held.prints[index]
