"""What all measurements print alike: a progress bar on standard error, tables, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 160  # columns

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and largest value seen."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def console(stderr: bool = False) -> Console:
    """A console that does not squeeze its tables where nobody watches, as in a file or a pipe."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=WIDTH)


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A bar on standard error for the time of the block; the block calls what it gets after each of `total` parts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> Table:
    """A table whose first `texts` columns are text and whose others are numbers."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number < texts else "right")
    for row in rows:
        drawn.add_row(*map(str, row))
    return drawn
