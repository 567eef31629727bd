"""A policy is two verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parlay.types import Offer, Speculation, StepPlan, StepResult


class PolicyRow(Protocol):
    """What a policy may know of a row; the engine's rows have it, and so have the simulator's."""

    @property
    def seq(self) -> int:
        """Its number, the same in every step."""
        ...

    @property
    def start(self) -> int:
        """Tokens in KV."""
        ...

    @property
    def count(self) -> int:
        """Known tokens that run in this step."""
        ...

    @property
    def samples(self) -> bool:
        """Whether something is emitted."""
        ...

    @property
    def max_depth(self) -> int:
        """How deep guesses may go; 0 where there may be none."""
        ...

    @property
    def speculation(self) -> Speculation:
        """What the request asked for."""
        ...

    @property
    def target_tpot(self) -> float | None:
        """Seconds per output token that the request wants to stay under, if it said so."""
        ...

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token, so that guesses may be chosen by their own values."""
        ...


class Policy(Protocol):
    """Decides what to bet on each row and learns from what came of it."""

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """Binds a drafter and a tree, or nothing, to every row, before any guess is drawn.

        Args:
            rows: The step's rows; a row takes no tree deeper than its `max_depth`.
            offers: Per row, what each drafter could bet.
            budget: Guesses that the step has room for.
        """
        ...

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """Learns from the outcome and timing of a step."""
        ...
