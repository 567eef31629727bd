"""Rows without an engine."""

from __future__ import annotations

from dataclasses import dataclass

from parlay.types import Speculation


@dataclass
class FakeRow:
    """What a policy sees of a row, to be set at will."""

    seq: int
    start: int = 200
    count: int = 1
    samples: bool = True
    max_depth: int = 16
    speculation: Speculation = "auto"
    target_tpot: float | None = None
