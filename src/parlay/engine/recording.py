"""What a server was asked and what became of it, as a file that `parlay simulate --trace` replays; no text, no tokens.

One JSON object a line: first what the server is, then every choice as it ends, at last what steps cost by then.

A policy bets where it expects to win, so what became of its bets says too much for all others. Two things tell the
simulator what else could have been won: guesses that are known before anything is bet are compared with what was
answered, whether they were bet on or not; and where a policy decides by itself, one step in `EVERY` bets on a drafter
that guesses at random, whatever the policy says.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parlay.bets import Bet, Tree
from parlay.policy.acceptance import LEVELS, RANKS, Trials
from parlay.policy.goodput import Goodput
from parlay.policy.recording import FORMAT
from parlay.types import Offer, Row, StepReport

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

logger = logging.getLogger(__name__)

EVERY = 16  # steps, one of which explores
EXPLORED = Tree((-1, -1, 0, 0, 2, 4))  # a chain of 4, and what comes second behind the two nodes that are reached most


def _matrix() -> list[list[int]]:
    return [[0] * RANKS for _ in range(LEVELS)]


@dataclass(slots=True)
class _Outcomes:
    """Of one method's guesses for one choice, by level and rank."""

    tried: list[list[int]] = field(default_factory=_matrix)
    accepted: list[list[int]] = field(default_factory=_matrix)

    def add(self, trials: Trials) -> None:
        for level, rank in trials.tried:
            self.tried[level][rank] += 1
        for level, rank in trials.accepted:
            self.accepted[level][rank] += 1

    def written(self) -> dict[str, list[list[int]]]:
        """Without what was never tried."""
        levels = max((level for level in range(LEVELS) if any(self.tried[level])), default=-1) + 1
        ranks = max((rank for line in self.tried for rank in range(RANKS) if line[rank]), default=-1) + 1
        return {name: [line[:ranks] for line in getattr(self, name)[:levels]] for name in ("tried", "accepted")}


@dataclass(slots=True)
class _Choice:
    """One that has not ended."""

    cached: int
    first: float | None = None
    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # how many tokens there were as each step began
    shown: dict[str, list[tuple[int, Offer]]] = field(default_factory=dict)  # and what it was shown then
    trees: set[str] = field(default_factory=set)  # methods that showed other trees than chains
    outcomes: dict[str, _Outcomes] = field(default_factory=dict)
    explored: dict[str, _Outcomes] = field(default_factory=dict)

    def look(self, offers: Sequence[Offer]) -> None:
        """Notes guesses that are known before they are bet on."""
        self.starts.append(len(self.tokens))
        for offer in offers:
            if offer.tokens and offer.tree.is_chain:
                self.shown.setdefault(offer.method, []).append((len(self.tokens), offer))
            elif offer.tokens:
                self.trees.add(offer.method)

    def hits(self) -> dict[str, list[list[float]] | None]:
        """By method: where it showed guesses, how many, how many came true, and how sure it was of each.

        None for a method that shows trees: what becomes of these is among the outcomes only.
        """

        def line(place: int, offer: Offer) -> list[float]:
            guesses = offer.tokens or ()
            came = _agreed(guesses, self.tokens[place : place + len(guesses)])
            return [place, len(guesses), came, *(round(sure, 3) for sure in offer.confidence or ())]

        chains = {method: [line(*entry) for entry in some] for method, some in self.shown.items()}
        return chains | dict.fromkeys(self.trees)


def _agreed(guesses: Sequence[int], tokens: Sequence[int]) -> int:
    pairs = zip(guesses, tokens, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(guesses), len(tokens)))


class Recording:
    """Writes a file while an engine serves, on its thread, from `start` to `close`.

    Args:
        engine: Whose steps.
        path: A new file, or one that is written over.

    Raises:
        OSError: when the file cannot be written.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine, self._began = engine, time.perf_counter()
        self._file = path.open("w", encoding="utf-8", buffering=1)  # a line is there once it is written
        self._choices: dict[int, _Choice] = {}
        self._most = 2 * engine.config.max_num_seqs  # more than that run only where some were aborted
        self._chance, self._next = random.Random(engine.config.seed), False  # whether the next step explores
        config = engine.config
        self._write({
            "parlay_recording": FORMAT,
            "model": config.model,
            "policy": engine.policy_name,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "kv_tokens": engine.scheduler.blocks.num_pages * config.page_size,
            "windows": {name: drafter.window for name, drafter in engine.drafters.by_name.items() if drafter.window},
        })  # fmt: skip

    def start(self) -> None:
        """Listens from the next step on."""
        self._engine.listeners.append(self.note)
        self._engine.explorer = self

    @property
    def awake(self) -> bool:
        """See `Explorer`: where the next step explores, under a policy that decides by itself."""
        return self._next and isinstance(self._engine.policy, Goodput)

    def bets(
        self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], own: Sequence[Bet | None]
    ) -> Sequence[Bet | None]:
        """See `Explorer`."""
        guessing = (offer for some in offers for offer in some if offer.tokens is None and not offer.ahead)
        methods = sorted({offer.method for offer in guessing})
        explores, self._next = self.awake and bool(methods), not self._chance.randrange(EVERY)
        if not explores:
            return own
        bet = Bet(self._chance.choice(methods), EXPLORED)
        return [mine or (bet if row.speculation != "off" else None) for row, mine in zip(rows, own, strict=True)]

    def note(self, report: StepReport) -> None:
        """Takes a step."""
        if len(self._choices) > self._most:
            self._drop_aborted()
        whole = zip(report.rows, report.offers, report.result.rows, report.deltas, strict=True)
        for row, offers, got, delta in whole:
            choice = self._choices.get(row.seq)
            if choice is None:
                choice = self._choices[row.seq] = _Choice(cached=row.start)
            if got.method is not None and got.tree.parents:
                trials = Trials.of(got.tree, got.accepted)
                choice.outcomes.setdefault(got.method, _Outcomes()).add(trials)
                if report.explored and row.own_bet is None:
                    choice.explored.setdefault(got.method, _Outcomes()).add(trials)
            if row.samples:
                choice.look(offers)
            if delta.tokens:
                choice.first = choice.first or report.ended
                choice.tokens += delta.tokens
            if delta.finish_reason is not None:
                self._end(row.seq, row.request.arrival, len(row.request.prompt), delta.finish_reason, report.ended)

    def close(self) -> None:
        """Writes what steps cost by now."""
        self._engine.explorer = None
        policy = self._engine.policy
        try:
            with self._file:
                if isinstance(policy, Goodput):
                    self._write({"profile": asdict(policy.clock.learnt())})
        except OSError as error:
            logger.warning("the recording has no end (%s)", error.strerror)

    def _drop_aborted(self) -> None:
        """Forgets choices that nobody waits for any more; a recording has none of them."""
        live = {seq.seq for seq in self._engine.scheduler.sequences()}
        self._choices = {seq: choice for seq, choice in self._choices.items() if seq in live}
        self._most = 2 * max(self._engine.config.max_num_seqs, len(self._choices))

    def _end(self, seq: int, arrival: float, prompt: int, reason: str, now: float) -> None:
        choice = self._choices.pop(seq)
        first = now if choice.first is None else choice.first
        self._write({
            "arrival": round(arrival - self._began, 6),
            "first": round(first - self._began, 6),
            "finish": round(now - self._began, 6),
            "prompt": prompt,
            "cached": choice.cached,
            "output": len(choice.tokens),
            "end": reason,
            "outcomes": {method: some.written() for method, some in choice.outcomes.items()},
            "explored": {method: some.written() for method, some in choice.explored.items()},
            "starts": choice.starts,
            "shown": choice.hits(),
        })  # fmt: skip

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
