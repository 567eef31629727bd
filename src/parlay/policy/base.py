"""A policy is two verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parlay.types import Offer, Row, StepPlan, StepResult


class Policy(Protocol):
    """Decides what to bet on each row and learns from what came of it."""

    def plan(self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """Binds a drafter and a tree, or nothing, to every row, before any guess is drawn.

        Args:
            rows: The step's rows; a row takes no tree deeper than its `max_depth`.
            offers: Per row, what each drafter could bet.
            budget: Guesses that the step has room for.
        """
        ...

    def observe(self, rows: Sequence[Row], result: StepResult) -> None:
        """Learns from the outcome and timing of a step."""
        ...
