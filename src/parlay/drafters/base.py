"""What a drafter is, and the engine's set of them."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Self

import torch

from parlay.bets import Bet, Tree, likely_tree
from parlay.config import TreeSampling
from parlay.engine.batch import Draft
from parlay.engine.compiling import Compilable
from parlay.engine.model import LoadedModel, TargetModel
from parlay.policy.trees import overlap, subtree
from parlay.types import InvalidRequest, Offer, Row, RowResult, Speculation, StepPlan

logger = logging.getLogger(__name__)


class Drafter(ABC):
    """Guesses tokens. The engine asks for capabilities, never for identity.

    What is registered under a name is a class of this kind.

    Attributes:
        name: The method's name in plans, requests and metrics; the name it is registered under.
        taps: Layers after which it needs the target's hidden states; `commit` then brings them. Empty if none. One
            more than there are layers is what the target's head reads, after the final norm.
        deterministic: Whether guesses follow from what was seen before, whatever the request's mode. Only then may
            `offer` show them. Others' drafts carry probabilities where their guesses were sampled.
        owns_kv: Whether it keeps KV of its own, which then has to catch up with tokens it has not seen.
        bytes_per_position: Memory that it needs for every position of the target's KV pool.
        sampling: How it draws siblings by chance, if it does; the engine sets it.
        largest: The tree that it is made for where the user names none.
        begins_next: Whether it begins next tokens instead of guessing; see `Offer.ahead`.
    """

    name: str
    taps: tuple[int, ...] = ()
    deterministic: bool = False
    owns_kv: bool = False
    bytes_per_position: int = 0
    sampling: TreeSampling = "sequoia"
    largest: Tree = likely_tree(16, 6)
    begins_next: bool = False
    window: int | None = None  # tokens that it reads at least of a row of which it has missed more than twice as many

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """Builds the drafter that serves a target.

        Args:
            tree: The largest tree that will be asked for.
            target: Whom it guesses for.
            source: Where its weights are, as the user wrote it.

        Raises:
            ValueError: in a sentence with the remedy, when it cannot guess for this target.
            CheckpointError: when its weights cannot be had.
        """
        raise ValueError(f"drafter {cls.name}: it cannot be chosen by its name; use it from Python")

    def attach(self, target: TargetModel) -> None:  # noqa: B027  (most keep nothing)
        """Called once, when the target's pages exist: makes room for what it keeps by position."""

    def detach(self) -> None:  # noqa: B027
        """Called once, when it is switched off: gives back what `attach` took of the target's pool."""

    def compilables(self) -> Sequence[Compilable]:
        """Layers of its own that run faster compiled."""
        return ()

    @abstractmethod
    def offer(self, rows: Sequence[Row]) -> Sequence[Offer | None]:
        """What it could bet on each row; host only and cheap. Nothing sampled is drawn here."""

    def hear(self, shown: Mapping[int, Sequence[Offer]]) -> None:  # noqa: B027
        """Called before a `draft` in which trees are free, as these may take in what others show and how sure they are.

        Args:
            shown: By the number of each row of the step, bound to it or not.
        """

    @abstractmethod
    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> Sequence[Draft | None]:
        """Guesses for the rows bound to it, at most the planned trees, never dropped for their own values.

        Args:
            rows: The rows.
            bets: What was planned for each.
            budget: Tokens that known ones left over in this step, for what it has missed; see `LevelDrafter`.
        """

    def commit(  # noqa: B027
        self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]
    ) -> None:
        """Hears what was emitted, before the rows' tokens grow.

        Args:
            rows: All rows of the step, whoever guessed for them.
            results: What became of them.
            taps: By layer, hidden states of the packed step; see `Scores`.
        """

    def forget(self, seq: int) -> None:  # noqa: B027
        """A row has ended."""

    def forget_answers(self) -> None:  # noqa: B027  (most remember none)
        """Drops what it has learnt from answers to earlier requests."""


class ShownGuesses(Drafter):
    """What drafters share whose guesses follow from tokens alone: an offer shows them, and a draft is a part of it."""

    deterministic = True
    largest = Tree.chain(10)

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._shown: dict[int, Offer | None] = {}

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`."""
        del target
        if source is not None:
            raise ValueError(f"drafter {cls.name}: it has no weights to load; leave {source!r} out")
        return cls(tree)

    @abstractmethod
    def guess(self, row: Row) -> Offer | None:
        """The row's next tokens, no deeper than its `max_depth`; None where there is nothing to go by."""

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """See `Drafter`."""
        offers = [self.guess(row) for row in rows]
        self._shown.update(zip([row.seq for row in rows], offers, strict=True))
        return offers

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int = 0) -> list[Draft | None]:
        """See `Drafter`."""
        drafts: list[Draft | None] = []
        for row, bet in zip(rows, bets, strict=True):
            offer = self._shown.get(row.seq)
            if offer is None or offer.tokens is None:
                drafts.append(None)
                continue
            nodes = overlap(offer.tree, bet.tree)
            drafts.append(Draft(self.name, subtree(offer.tree, nodes), tuple(offer.tokens[node] for node in nodes)))
        return drafts

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self._shown.pop(seq, None)


class Drafters:
    """The drafters of one engine, by name.

    One that raises is switched off for the engine's life and let go, with its memory: guesses are all that is lost.

    Attributes:
        by_name: Those that work.
        failed: Names of those that were switched off.
        sources: Where the weights of those are from that have some.
    """

    def __init__(self, drafters: Sequence[Drafter], sources: Mapping[str, str] | None = None) -> None:
        self.by_name = {drafter.name: drafter for drafter in drafters}
        self.sources = dict(sources or {})
        self.failed: tuple[str, ...] = ()
        self._vocab_size = sys.maxsize  # until a target is there

    def check(self, wish: Speculation | Bet) -> None:
        """Refuses a bet on a drafter that was never there.

        Raises:
            InvalidRequest: naming those that are.
        """
        known = (*self.by_name, *self.failed)
        if isinstance(wish, Bet) and wish.method not in known:
            here = f"bet on {' or '.join(known)}" if known else "no drafter was loaded"
            message = f"speculation: there is no drafter {wish.method!r} here: write off, auto or max, or {here}"
            raise InvalidRequest(message, "speculation")

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose hidden states somebody needs."""
        return tuple(sorted({layer for drafter in self.by_name.values() for layer in drafter.taps}))

    @property
    def bytes_per_position(self) -> int:
        return sum(drafter.bytes_per_position for drafter in self.by_name.values())

    def attach(self, target: TargetModel) -> None:
        self._vocab_size = target.vocab_size
        for drafter in self.by_name.values():
            drafter.attach(target)

    def compilables(self) -> list[Compilable]:
        return [layers for drafter in self.by_name.values() for layers in drafter.compilables()]

    def offer(self, rows: Sequence[Row], resting: Container[str] = ()) -> list[list[Offer]]:
        """Per row, every drafter's offer, but of those that rest and that no row has asked for by name.

        Rows that may not guess get none.
        """
        offers: list[list[Offer]] = [[] for _ in rows]
        willing = [i for i, row in enumerate(rows) if row.max_depth > 0]
        wanted = {bet.method for row in rows if (bet := row.own_bet) is not None}
        for drafter in self._working():
            if drafter.name in resting and drafter.name not in wanted:
                continue
            with self._or_off(drafter):
                found = drafter.offer([rows[i] for i in willing])
                shown = [offer for offer in found if offer is not None and offer.tokens is not None]
                assert drafter.deterministic or not shown, f"{drafter.name} shows sampled guesses"
                for offer in filter(None, found):
                    self._check_offer(drafter, offer)
                for i, offer in zip(willing, found, strict=True):
                    if offer is not None:
                        offers[i].append(offer)
        return offers

    def draft(
        self, rows: Sequence[Row], plan: StepPlan, budget: int, offers: Sequence[Sequence[Offer]]
    ) -> list[Draft | None]:
        """Lets each drafter guess for the rows that were bound to it, all of them at once; `budget` as for each.

        Args:
            rows: Of the step.
            plan: Their bets.
            budget: See `Drafter.draft`.
            offers: Per row, what was offered in this step, for trees that are free.
        """
        drafts: list[Draft | None] = [None] * len(rows)
        shown: dict[int, list[Offer]] = {}
        if any(bet is not None and bet.free for bet in plan.bets):
            shown = {
                row.seq: [offer for offer in some if offer.shows_odds] for row, some in zip(rows, offers, strict=True)
            }
        for drafter in self._working():
            bound = [(i, bet) for i, bet in enumerate(plan.bets) if bet is not None and bet.method == drafter.name]
            if not bound:
                continue
            with self._or_off(drafter):
                if shown:
                    drafter.hear(shown)
                guesses = drafter.draft([rows[i] for i, _ in bound], [bet for _, bet in bound], budget)
                for (_, bet), draft in zip(bound, guesses, strict=True):
                    small = draft is None or (len(draft.tree) <= len(bet.tree) and draft.tree.depth <= bet.tree.depth)
                    assert small, f"{drafter.name} drew more than the planned tree"
                    assert draft is None or self._are_tokens(draft.tokens, draft.tree), (
                        f"{drafter.name} draws no tokens"
                    )
                for (i, _), draft in zip(bound, guesses, strict=True):
                    drafts[i] = draft if draft is not None and (draft.tree or draft.ahead) else None
        return drafts

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        for drafter in self._working():
            with self._or_off(drafter):
                drafter.commit(rows, results, taps)

    def forget(self, seq: int) -> None:
        for drafter in self._working():
            with self._or_off(drafter):
                drafter.forget(seq)

    def forget_answers(self) -> None:
        for drafter in self._working():
            with self._or_off(drafter):
                drafter.forget_answers()

    def _check_offer(self, drafter: Drafter, offer: Offer) -> None:
        """An offer that breaks its promises would be taken at its word by policies."""
        assert offer.method == drafter.name, f"{drafter.name} makes offers for {offer.method}"
        assert offer.tokens is None or self._are_tokens(offer.tokens, offer.tree), f"{drafter.name} shows no tokens"
        sure = offer.confidence
        if sure is not None:
            assert len(sure) == len(offer.tree), f"{drafter.name} is sure of other guesses than it shows"
            known = not sure or (0 <= min(sure) <= max(sure) <= 1 and sum(sure) >= 0)  # NaN shows in the sum
            assert known, f"{drafter.name} is sure beyond reason"

    def _are_tokens(self, tokens: Sequence[int], tree: Tree) -> bool:
        return len(tokens) == len(tree) and (not tokens or (min(tokens) >= 0 and max(tokens) < self._vocab_size))

    def _working(self) -> list[Drafter]:
        return list(self.by_name.values())

    @contextmanager
    def _or_off(self, drafter: Drafter) -> Iterator[None]:
        """Switches a drafter off that raises in the block; what it did there before counts for nothing."""
        try:
            yield
        except Exception:  # whatever it is, requests go on without its guesses
            logger.exception("drafter %s failed and is switched off", drafter.name)
            del self.by_name[drafter.name]
            self.failed = (*self.failed, drafter.name)
            with suppress(Exception):  # it has failed before
                drafter.detach()
