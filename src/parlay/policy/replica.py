"""One simulated server: continuous batching with chunked prompts under a KV limit, one step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from parlay.policy.base import Policy
from parlay.policy.offering import Offering
from parlay.policy.outcomes import Outcomes
from parlay.policy.server import BET, CONTEXT, GOAL, KIND, LEFT, OUT, READ, REQUEST, Counts, Server, SimulatedRow, Times
from parlay.policy.workload import Workload
from parlay.types import Offer, RowResult, StepPlan, StepResult

MOST_DEPTH = 16
CHANCES = 4096  # random numbers drawn at a time
AHEAD = 16  # steps computed together at most
TOLERANCE = 128  # plans are kept for 16 steps while the number of rows is within 16/128 of what it was


@dataclass(slots=True)
class _Held:
    """The bets of the last plan, while they are kept."""

    steps: int = 0
    rows: int = 0  # that emitted
    common: int = 0  # the commonest bet, for rows that came since
    guesses: int = 0
    draft: float = 0.0  # seconds
    counted: bool = False  # whether guesses and draft are those of the rows as they are


@dataclass(slots=True)
class _Ahead:
    """Steps that were computed together, as nothing comes between them but time; they are lived one by one.

    Attributes:
        emitted: [steps, rows] by each row since the first of them began.
        totals: [steps] by all rows, likewise.
        seconds: [steps] of each.
        full: Whether no request could be admitted meanwhile.
        done: How many of them were lived.
    """

    emitted: np.ndarray
    totals: list[int]
    seconds: list[float]
    full: bool
    done: int = 0


class Replica:
    """Runs the requests that are sent to it.

    Args:
        server: What it is.
        workload: All requests of the simulation.
        outcomes: What becomes of bets.
        policy: Who bets.
        offers: What could be bet on every row.
        times: Where it notes when requests got their first token, and when they ended.
        rng: Its own chance.
        note: Told of every step: when it began, guesses, rows that emitted, tokens emitted.
        reuse: Steps for which a plan is kept while the number of rows stays about the same; 1 plans every step.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        outcomes: Outcomes,
        policy: Policy,
        offers: Sequence[Offer],
        times: Times,
        rng: np.random.Generator,
        note: Callable[[float, int, int, int], None],
        reuse: int = 1,
    ) -> None:
        self.server, self.workload, self.policy, self.counts = server, workload, policy, Counts()
        self._outcomes, self._times, self._rng = outcomes, times, rng
        self._offering = Offering(offers, server, workload.shown)
        self._note, self._reuse = note, reuse
        self._queue: deque[tuple[int, int]] = deque()  # requests, and what they had emitted when they were preempted
        self._table = np.zeros((READ + len(self._offering.readers), server.max_num_seqs), dtype=np.intp)
        self._rows = self._filling = self._context = 0
        self._held = _Held()
        self._ahead: _Ahead | None = None
        self._chances, self._next = rng.random(CHANCES), 0

    def send(self, request: int) -> None:
        """Queues a request."""
        self._queue.append((request, 0))

    @property
    def idle(self) -> bool:
        return not self._rows and not self._queue

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> tuple[float, int]:
        """Runs a step.

        Returns:
            When it ends, and how many requests end with it.
        """
        ahead = self._ahead
        if ahead is not None:
            if not self._queue or ahead.full:
                return self._live(now, ahead)
            self._settle(ahead)
        full = self._admit()
        if self._looks_ahead():
            return self._live(now, self._look_ahead(full))
        counts = self._known()
        table = self._table[:, : self._rows]
        emits = counts == table[LEFT]
        new, emitting = int(counts.sum()), int(emits.sum())
        if self._context + new > self.server.kv_tokens:
            self._preempt()
            return now, 0
        planned = self._bets(counts, emits, emitting)
        self._count_bets()
        if self._context + new + self._held.guesses > self.server.kv_tokens:
            table[BET] = 0  # bets go before anybody is preempted
            self._held.counted = False
            self._count_bets()
        seconds = self._seconds(counts, self._noise(1)[0])
        chance = self._draw(self._rows)
        end, accepted = self._outcomes.draw(table[BET], table[KIND], chance, table[REQUEST], table[OUT])
        duration = sum(seconds.values())
        if planned is not None:
            self._observe(planned, counts, end, seconds)
        guesses, before = self._held.guesses, self.counts.emitted
        ended = self._commit(table, counts, emits, accepted, now + duration)
        self.counts.steps += 1
        self.counts.busy += duration
        self.counts.emitting += emitting
        self.counts.guesses += guesses
        self._note(now, guesses, emitting, self.counts.emitted - before)
        return now + duration, ended

    def _looks_ahead(self) -> bool:
        """Whether the next steps hang on nothing but chance: no prompts, no plan that is due, KV for the worst case."""
        held, rows = self._held, self._rows
        if self._offering.readers and held.guesses:
            return False  # what they read is paid step by step
        if self._filling or not rows or self._reuse - held.steps < 2 or not self._holds(rows):
            return False
        most = rows * AHEAD * (1 + MOST_DEPTH)
        return not self._outcomes.recorded and self._context + most <= self.server.kv_tokens

    def _look_ahead(self, full: bool) -> _Ahead:
        """Steps up to the next plan, or until a request ends."""
        self._count_bets()
        steps, rows = min(self._reuse - self._held.steps, AHEAD), self._rows
        table = self._table[:, :rows]
        chance = self._draw(steps * rows).reshape(steps, rows)
        _, accepted = self._outcomes.draw(table[BET], table[KIND], chance, table[REQUEST], table[OUT])
        left = table[GOAL] - table[OUT]
        emitted = (accepted + 1).cumsum(axis=0)
        ends = (emitted >= left).any(axis=1)
        if ends.any():
            emitted = np.minimum(emitted[: int(ends.argmax()) + 1], left)
        totals = emitted.sum(axis=1)
        grown = np.concatenate([[0], totals[:-1]])
        profile, guesses = self.server.profile, self._held.guesses
        verify = profile.verify(rows + guesses, rows, self._context + rows + grown)
        seconds = (verify + self._held.draft + profile.host(rows, guesses)) * self._noise(len(totals))
        self._ahead = _Ahead(emitted, totals.tolist(), seconds.tolist(), full)
        return self._ahead

    def _live(self, now: float, ahead: _Ahead) -> tuple[float, int]:
        """The next of the steps that were computed together."""
        place, rows, counts, guesses = ahead.done, self._rows, self.counts, self._held.guesses
        ahead.done += 1
        emitted = ahead.totals[place] - (ahead.totals[place - 1] if place else 0)
        counts.steps += 1
        counts.busy += ahead.seconds[place]
        counts.emitting += rows
        counts.guesses += guesses
        counts.emitted += emitted
        counts.accepted += emitted - rows
        end = now + ahead.seconds[place]
        self._note(now, guesses, rows, emitted)
        if ahead.done < len(ahead.seconds):
            return end, 0
        self._settle(ahead)
        return end, self._release(end)

    def _settle(self, ahead: _Ahead) -> None:
        """Brings the rows to where the lived steps have brought them."""
        self._ahead = None
        if ahead.done:
            table = self._table[:, : self._rows]
            table[OUT] += ahead.emitted[ahead.done - 1]
            table[CONTEXT] += ahead.emitted[ahead.done - 1]
            self._context += ahead.totals[ahead.done - 1]
            self._held.steps += ahead.done

    def _admit(self) -> bool:
        """Starts waiting requests while rows and KV last; whether none could be started if there were more."""
        while self._queue and self._rows < self.server.max_num_seqs:
            request, out = self._queue[0]
            known = int(self.workload.prompt[request]) + out
            waiting = int(self._table[LEFT, : self._rows].sum()) if self._filling else self._rows
            if self._rows and self._context + waiting + known > self.server.kv_tokens:
                return True
            self._queue.popleft()
            goal, kind = self.workload.output[request], self.workload.kind[request]
            self._table[:READ, self._rows] = known, 0, out, goal, kind, 0, request
            self._table[READ:, self._rows] = 0
            self._rows += 1
            self._filling += 1
        return self._rows == self.server.max_num_seqs

    def _known(self) -> np.ndarray:
        """[rows] known tokens that run; rows with few of them go first."""
        if not self._filling:
            return self._table[LEFT, : self._rows]  # all 1
        left = self._table[LEFT, : self._rows]
        if left.sum() <= self.server.max_num_batched_tokens:
            return left.copy()
        order = np.argsort(left, kind="stable")
        before = np.concatenate([[0], np.cumsum(left[order])[:-1]])
        counts = np.empty_like(left)
        counts[order] = np.clip(self.server.max_num_batched_tokens - before, 0, left[order])
        return counts

    def _bets(self, counts: np.ndarray, emits: np.ndarray, emitting: int) -> list[SimulatedRow] | None:
        """Plans, unless the last plan will do.

        Returns:
            The rows that were planned for; None where nothing was planned.
        """
        held, table = self._held, self._table[:, : self._rows]
        if not emitting or (held.steps < self._reuse and self._holds(emitting)):
            held.steps += 1
            if self._filling and held.common:
                table[BET, emits & ((table[LEFT] != 1) | (table[OUT] == 0))] = held.common
                held.counted = False
            return None
        began = perf_counter()
        deepest = np.where(emits, np.clip(table[GOAL] - table[OUT] - 1, 0, MOST_DEPTH), 0)
        runs = np.flatnonzero(counts)
        rows = [
            SimulatedRow(*values)
            for values in zip(
                table[REQUEST, runs].tolist(),
                table[CONTEXT, runs].tolist(),
                counts[runs].tolist(),
                emits[runs].tolist(),
                deepest[runs].tolist(),
                strict=True,
            )
        ]
        room = self.server.max_num_seqs * 64
        room = max(0, min(room, self.server.kv_tokens - self._context - int(counts.sum())))
        plan = self.policy.plan(rows, self._offering.of(self._table[:, runs], counts[runs]), room)
        table[BET] = 0
        table[BET, runs] = self._numbers(plan)
        untrimmed = deepest == deepest.max()
        common = int(np.bincount(table[BET, untrimmed]).argmax()) if self._reuse > 1 else 0
        self._held = _Held(1, emitting, common)
        self.counts.plans += 1
        self.counts.policy_seconds += perf_counter() - began
        return rows

    def _holds(self, rows: int) -> bool:
        """Whether the last plan does for so many rows; the longer plans are kept, the more may rows differ."""
        return TOLERANCE * abs(rows - self._held.rows) <= self._reuse * self._held.rows

    def _numbers(self, plan: StepPlan) -> list[int]:
        bet = self._outcomes.bet
        return [0 if some is None or not some.tree else bet(some.method, some.tree) for some in plan.bets]

    def _count_bets(self) -> None:
        """Guesses of the rows as they are, and what their drafters take."""
        held = self._held
        if held.counted:
            return
        bets = self._table[BET, : self._rows]
        held.guesses, held.draft, held.counted = int(self._outcomes.size[bets].sum()), 0.0, True
        if not held.guesses:
            return
        by_method: dict[str, list[int]] = {}
        for bet in np.unique(bets).tolist():
            method, _ = self._outcomes.bets[bet]
            if method is not None:
                by_method.setdefault(method, []).append(bet)
        for method, some in by_method.items():
            mine = np.isin(bets, some)
            depth = max(self._outcomes.bets[bet][1].depth for bet in some)
            guesses, context = self._outcomes.size[bets[mine]].sum(), self._table[CONTEXT, : self._rows][mine].sum()
            held.draft += self.server.profile.draft(method)(depth, int(mine.sum()), int(guesses), int(context))

    def _seconds(self, counts: np.ndarray, slower: float) -> dict[str, float]:
        """Of a step in which each row runs so many known tokens; rows that run none cost nothing."""
        profile, guesses, new = self.server.profile, self._held.guesses, int(counts.sum())
        rows, context = self._rows, self._context
        if self._filling and not counts.all():
            rows, context = int((counts > 0).sum()), int(self._table[CONTEXT, : self._rows][counts > 0].sum())
        verify = float(profile.verify(new + guesses, rows, context + new))
        host = profile.host(rows, guesses)
        draft = self._held.draft
        if self._offering.readers and guesses:
            draft += self._offering.read(self._table[:, : self._rows], [method for method, _ in self._outcomes.bets])
        return {"verify": slower * verify, "draft": slower * draft, "accept": slower * host}

    def _noise(self, steps: int) -> np.ndarray:
        """[steps] how much slower than its profile each is."""
        if not self.server.noise:
            return np.ones(steps)
        return np.exp(self.server.noise * self._rng.standard_normal(steps))

    def _draw(self, count: int) -> np.ndarray:
        if self._next + count > CHANCES:
            self._chances, self._next = self._rng.random(max(CHANCES, count)), 0
        self._next += count
        return self._chances[self._next - count : self._next]

    def _observe(
        self, rows: list[SimulatedRow], counts: np.ndarray, end: np.ndarray, seconds: dict[str, float]
    ) -> None:
        began = perf_counter()
        runs = np.flatnonzero(counts)
        results = []
        for row, bet, last in zip(rows, self._table[BET, runs].tolist(), end[runs].tolist(), strict=True):
            method, tree = self._outcomes.bets[bet]
            path = self._outcomes.paths[bet][last]
            results.append(RowResult(method, tree, path, (0,) * (len(path) + 1) if row.samples else ()))
        self.policy.observe(rows, StepResult(tuple(results), seconds))
        self.counts.policy_seconds += perf_counter() - began

    def _commit(
        self, table: np.ndarray, counts: np.ndarray, emits: np.ndarray, accepted: np.ndarray, end: float
    ) -> int:
        """Notes what was emitted, and returns how many requests have ended."""
        emitted = np.minimum(accepted + 1, table[GOAL] - table[OUT])
        if self._filling:
            emitted *= emits
            fresh = emits & (table[OUT] == 0)
            self._times.first[table[REQUEST, fresh]] = end
            table[CONTEXT] += counts + np.maximum(emitted - 1, 0)
            table[LEFT] = np.where(emits, 1, table[LEFT] - counts)
            table[OUT] += emitted
            self._filling = _unsettled(table)
            self._held.counted = False
        else:
            table[CONTEXT] += emitted
            table[OUT] += emitted
        self.counts.emitted += int(emitted.sum())
        self.counts.accepted += int((emitted - emits).sum())
        ended = self._release(end)
        self._context = int(self._table[CONTEXT, : self._rows].sum())
        return ended

    def _release(self, end: float) -> int:
        """Lets go of requests that have ended; returns how many."""
        table = self._table[:, : self._rows]
        done = (table[OUT] >= table[GOAL]).nonzero()[0]
        if len(done):
            self._times.finish[table[REQUEST, done]] = end
            self._context -= int(table[CONTEXT, done].sum())
            for slot in done[::-1].tolist():
                self._drop(slot)
        return len(done)

    def _drop(self, slot: int) -> None:
        """Takes a row out; those behind it move up, so that rows stay in the order in which they began."""
        self._table[:, slot : self._rows - 1] = self._table[:, slot + 1 : self._rows]
        self._rows -= 1
        self._held.counted = False

    def _preempt(self) -> None:
        """Sends the youngest row back to the queue's head; it will be computed again."""
        slot = self._rows - 1
        request, out = int(self._table[REQUEST, slot]), int(self._table[OUT, slot])
        self._queue.appendleft((request, out))
        self._drop(slot)
        self._filling = _unsettled(self._table[:, : self._rows])
        self._context = int(self._table[CONTEXT, : self._rows].sum())
        self.counts.preemptions += 1


def _unsettled(table: np.ndarray) -> int:
    """Rows that are not simply decoding: that have more than one known token to run, or have emitted nothing yet."""
    return int(((table[LEFT] != 1) | (table[OUT] == 0)).sum())
