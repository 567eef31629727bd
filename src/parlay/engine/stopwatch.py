"""Steps over rows that never were requests, timed."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parlay.bets import NO_TREE, Bet, Tree, likely_tree
from parlay.drafters.base import Drafter
from parlay.engine.batch import Draft
from parlay.policy.trees import overlap, subtree
from parlay.types import Request, Row, SamplingParams

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

NEW = (1, 2, 3, 4, 5, 7, 9, 13, 17, 33)  # tokens of a row in a pass: its last known one, and guesses
WIDE = (25, 49, 65, 97, 129, 193, 257, 385, 513, 769)  # the same where layers stream, and more guesses cost little
MOST_CONTEXT = 8192  # tokens in KV of all rows: more would take memory that nobody may ever need
TREES = (Tree.chain(1), Tree.chain(2), Tree.chain(4), Tree((-1, -1, -1, 0, 0, 1, 1, 2)))


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: so many rows with so many tokens in KV each, and so many new ones each."""

    rows: int
    context: int
    new: int

    @property
    def span(self) -> int:
        """Positions of a row, those of guesses included."""
        return self.context + 1 + max(self.new - 1, len(TREES[-1]))


@dataclass(frozen=True, slots=True)
class Limits:
    """What steps of an engine can be.

    Attributes:
        rows: At a time.
        new: Tokens in one step.
        context: Positions of a row.
        pages: Of the pool, without the null page.
        page_size: Positions of a page.
    """

    rows: int
    new: int
    context: int
    pages: int
    page_size: int

    def allows(self, shape: Shape) -> bool:
        """Whether such a step can be."""
        span = shape.span
        held = shape.rows * -(-span // self.page_size)
        return (
            shape.rows <= self.rows
            and shape.rows * shape.new <= self.new
            and span <= self.context
            and held <= self.pages
            and shape.rows * shape.context <= MOST_CONTEXT
        )


class Stopwatch:
    """Steps over made-up rows, timed.

    Args:
        engine: Idle.
        limits: What its steps can be.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._chance = random.Random(0)

    def verify(self, shape: Shape) -> tuple[float, float]:
        """Seconds of a pass, and of choosing tokens behind it."""
        tree = Tree.chain(shape.new - 1) if shape.new <= NEW[-1] else likely_tree(shape.new - 1, 12)
        rows = self.rows(shape)
        draft = Draft("calibration", tree, tuple(self._tokens(len(tree)))) if tree else None
        self._wait()
        began = time.perf_counter()
        scores = self._engine.model.verify(rows, [draft] * len(rows), self._engine.drafters.taps)
        self._wait()
        passed = time.perf_counter()
        self._engine.acceptor.accept(rows, [draft] * len(rows), scores)
        return passed - began, time.perf_counter() - passed

    def draft(self, drafter: Drafter, rows: Sequence[Row], tree: Tree) -> tuple[float, bool]:
        """Seconds of guessing for rows, and whether every one of them got guesses."""
        offers = drafter.offer(rows)
        trees = [subtree(offer.tree, overlap(offer.tree, tree)) if offer else NO_TREE for offer in offers]
        bets = [Bet(drafter.name, some) for some in trees]
        self._wait()
        began = time.perf_counter()
        drafts = drafter.draft(rows, bets, self._limits.new)
        self._wait()
        return time.perf_counter() - began, None not in drafts

    def offered(self, drafter: Drafter, rows: Sequence[Row], tree: Tree) -> Tree:
        """What a drafter offers all of these rows of a tree."""
        for offer in drafter.offer(rows):
            tree = subtree(offer.tree, overlap(offer.tree, tree)) if offer else NO_TREE
        return tree

    def rows(self, shape: Shape) -> list[Row]:
        """Rows with one known token to run, each on pages of its own."""
        size = self._limits.page_size
        each = -(-shape.span // size)
        found = []
        for line in range(shape.rows):
            tokens = array("i", self._tokens(shape.context + 1))
            pages = list(range(1 + line * each, 1 + (line + 1) * each))
            request = Request("calibration", tuple(tokens), SamplingParams(temperature=0, ignore_eos=True))
            found.append(Row(-1 - line, request, 0, tokens, len(tokens), shape.context, 1, 0, 64, pages))
        return found

    def long_rows(self, rows: int, context: int, new: int) -> list[Row]:
        """Rows whose texts can go on for so many tokens; none where that cannot be."""
        shape = Shape(rows, context, new)
        return self.rows(shape) if self._limits.allows(shape) else []

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(min(1000, self._engine.model.vocab_size)) for _ in range(count)]

    def _wait(self) -> None:
        if self._engine.model.device.type == "cuda":
            torch.cuda.synchronize(self._engine.model.device)
