"""What steps take that begin the next token, over plain ones; see `parlay.engine.pipelined`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from parlay.bets import Bet
from parlay.engine.sampling import argmax

if TYPE_CHECKING:
    from parlay.drafters.base import Drafter
    from parlay.engine.engine import Engine
    from parlay.types import Row

ROWS = (1, 2, 4)
CONTEXT = 64
TOKENS = 48  # of each text, of which the first few are not counted
FIRST = 8
ENOUGH = 1.5  # seconds after which a text ends sooner, if it has twice as many tokens as are not counted


def time_ahead(
    make: Callable[[int, int, int], list[Row]], engine: Engine, drafter: Drafter
) -> tuple[tuple[int, float], ...]:
    """By rows, the mean seconds of a step that begins the next token over the median of plain ones.

    Both continue the same made-up texts greedily, since how often candidates match is half of the matter.

    Args:
        make: Rows of so many, with so much context, and room for so many more tokens; none where that cannot be.
        engine: Idle.
        drafter: What begins the next token.
    """
    found = []
    for count in ROWS:
        most = max((len(offer.tree) for offer in drafter.offer(make(count, CONTEXT, TOKENS)) if offer), default=0)
        if most and (rows := make(count, CONTEXT, TOKENS + 1 + most)):
            ahead, plain = (_seconds(rows, engine, some) for some in (drafter, None))
            found.append((count, statistics.fmean(ahead) / statistics.median(plain)))
    return tuple(found)


def _seconds(rows: Sequence[Row], engine: Engine, drafter: Drafter | None) -> list[float]:
    """Of every step of a text but the first few."""
    rows = [replace(row, tokens=row.tokens[:]) for row in rows]
    found, end = [], time.perf_counter() + ENOUGH
    while len(found) < TOKENS and (len(found) < 2 * FIRST or time.perf_counter() < end):
        offers = drafter.offer(rows) if drafter else [None] * len(rows)
        bets = [Bet(offer.method, offer.tree) for offer in offers if offer]
        began = time.perf_counter()
        drafts = drafter.draft(rows, bets, 0) if drafter else [None] * len(rows)
        logits = engine.model.verify(rows, drafts, engine.drafters.taps).logits
        tokens = argmax(logits).tolist()
        found.append(time.perf_counter() - began)
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        rows = [replace(row, length=row.length + 1, start=row.start + 1) for row in rows]
    return found[FIRST:]
