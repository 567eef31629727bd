"""The closed loop: bets what gives most tokens per second now, by what steps cost and guesses earned so far.

It follows SmartSpec (Liu et al. 2024, arXiv 2406.14066) in its objective and its loop, and decides for every row which
method to bet on, how deep, with what tree, or not at all; see `parlay.policy.allocation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parlay.policy.acceptance import ConfidenceCurve, MethodAcceptance, Trials
from parlay.policy.allocation import LINES, Allocation, Candidates, allocate, best_rate, no_bets
from parlay.policy.base import PolicyRow
from parlay.policy.cost import LiveScale, Profile
from parlay.policy.offers import MethodOffers
from parlay.policy.trees import Floats
from parlay.types import Bet, Offer, StepPlan, StepResult

PROBE_GUESSES = 2  # enough to see whether the first guess is good and whether a second one is


@dataclass(frozen=True, slots=True)
class _Load:
    """What a step does anyway."""

    rows: int
    new: int
    context: int

    @classmethod
    def of(cls, rows: Sequence[PolicyRow]) -> _Load:
        return cls(len(rows), sum(row.count for row in rows), sum(row.start + row.count for row in rows))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a plan was expected to bring, for comparison with what it brought: tokens, seconds, seconds without bets."""

    emitted: float
    seconds: float
    seconds_off: float


class Goodput:
    """Maximises tokens per second over method, depth, tree and off, row by row.

    Args:
        profile: What steps cost; corrected while serving.
        margin: How much better than no bet a plan must look before betting starts again, as a share.
        probe_share: Share of the time that may be spent on finding out whether a method that is off has become good.
        horizon: Steps over which it spreads what it costs to bring a drafter up to date.
        priors: By method, acceptance by rank before anything is known.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        margin: float = 0.03,
        probe_share: float = 0.01,
        horizon: float = 32.0,
        priors: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.profile = profile
        self.verify_scale, self.draft_scale, self.host_scale = LiveScale(), LiveScale(), LiveScale()
        self.acceptance: dict[str, MethodAcceptance] = {}
        self.confidence: dict[str, ConfidenceCurve] = {}
        self.expected = Expected(0.0, 0.0, 0.0)
        self._priors = dict(priors or {})
        self._margin, self._probe_share, self._horizon = margin, probe_share, horizon
        self._betting = False
        self._credit = 0.0  # seconds that may be spent on probes
        self._line = LINES[0]
        self._rates: dict[int, float] = {}  # the best known, by the number of rows that emit
        self._idle: dict[str, int] = {}  # steps since a method was last bet on
        self._seen: dict[int, int] = {}  # seq -> step
        self._step = 0

    # ---- plan -------------------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        bets: list[Bet | None] = [None] * len(rows)
        emitting = [row for row in rows if row.samples]
        if not emitting:
            return StepPlan(tuple(bets))
        load, plain = _Load.of(rows), _Load(len(emitting), len(emitting), sum(row.start + 1 for row in emitting))
        methods = self._offers(rows, offers)
        room = min(budget, sum(len(method.node) for method in methods))
        certain = np.array([float(row.samples) for row in rows])
        candidates = [method.candidates for method in methods]
        seconds = self._seconds(plain, room)
        found = self._at_best_rate(candidates, len(rows), float(certain.sum()), seconds, plain.rows)
        whole = seconds if load == plain else self._seconds(load, room)
        rate = self._rates[plain.rows]
        weights = self._weights(rows, found, candidates, whole)
        if load != plain or (weights != 1).any():
            wanted = [_weighted(c, weights) for c in (candidates if self._betting or (weights != 1).any() else [])]
            found = allocate(wanted, len(rows), float(certain @ weights), whole, rate)
        tokens = float(certain.sum())
        for method, bought in zip(methods, found.guesses, strict=False):
            tokens += float(method.candidates.value[bought].sum())
            for row, bet in method.bets(bought):
                bets[row] = bet
        more, longer = self._probe(methods, bets, whole, rate)
        self.expected = Expected(tokens + more, found.seconds + longer, float(whole[0]))
        return StepPlan(tuple(bets))

    def _offers(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]]) -> list[MethodOffers]:
        by_method: dict[str, list[tuple[int, PolicyRow, Offer]]] = {}
        for index, (row, some) in enumerate(zip(rows, offers, strict=True)):
            if some and row.samples and row.max_depth > 0 and row.speculation != "off":
                for offer in some:
                    if offer.tree.parents:
                        by_method.setdefault(offer.method, []).append((index, row, offer))
        return [
            MethodOffers.of(
                offered,
                self.acceptance.setdefault(name, MethodAcceptance(self._priors.get(name, (0.5, 0.1, 0.05, 0.03)))),
                self.confidence.setdefault(name, ConfidenceCurve()),
                self.profile.draft(name).scaled(self.draft_scale.factor),
                self._horizon,
            )
            for name, offered in by_method.items()
        ]

    def _seconds(self, load: _Load, room: int) -> Floats:
        """[room + 1] seconds of a step by its guesses, without the drafters'."""
        guesses = np.arange(room + 1)
        passes = self.profile.verify(load.new + guesses, load.rows, load.context) * self.verify_scale.factor
        host = self.profile.host
        return passes + self.host_scale.factor * (host(load.rows, 0) + host.per_guess * guesses)

    def _at_best_rate(
        self, candidates: Sequence[Candidates], num_rows: int, certain: float, seconds: Floats, emitting: int
    ) -> Allocation:
        """The best bets beside no prompt, whose rate is the price of time; none where betting does not pay."""
        known = self._rates.get(emitting, 0.0)
        if known and self._step % 16:  # much as in the last step: one price and one line do
            found = best_rate(candidates, num_rows, certain, seconds, known, rounds=1, lines=(self._line,))
        else:
            found = best_rate(candidates, num_rows, certain, seconds, known)
        self._line = found.line
        rate, off = found.emitted / found.seconds, certain / float(seconds[0])
        self._betting = rate > off * (1.0 if self._betting else 1.0 + self._margin)
        self._rates[emitting] = rate if self._betting else off
        return found if self._betting else no_bets(candidates, num_rows, certain, seconds)

    def _weights(
        self, rows: Sequence[PolicyRow], found: Allocation, candidates: Sequence[Candidates], seconds: Floats
    ) -> Floats:
        """How much a token of each row counts.

        A row that asked for the lowest latency counts as all rows together, which makes time as dear as its own rate.
        One that would miss its target under these bets counts twice, four times, and so on up to 16 times, until it
        would not.
        """
        weights = np.ones(len(rows))
        weights[[row.speculation == "max" for row in rows]] = max(1, len(rows))
        targets = np.array([row.target_tpot or np.inf for row in rows])
        for _ in range(4 if np.isfinite(targets).any() else 0):
            emitted = np.ones(len(rows))
            for method, bought in zip(candidates, found.guesses, strict=True):
                emitted += np.bincount(method.rows[method.tree[bought]], method.value[bought], len(rows))
            late = found.seconds / emitted > targets
            if not late.any():
                break
            weights[late] *= 2
            weighted = [_weighted(c, weights) for c in candidates]
            rate = found.emitted / found.seconds
            certain = float(sum(weight for weight, row in zip(weights, rows, strict=True) if row.samples))
            bought = allocate(weighted, len(rows), certain, seconds, rate)
            found = Allocation(bought.method, bought.guesses, found.emitted, bought.seconds)
        return weights

    def _probe(
        self, methods: Sequence[MethodOffers], bets: list[Bet | None], seconds: Floats, rate: float
    ) -> tuple[float, float]:
        """Bets a little on the method that has been off for longest, when enough time was put by for it.

        Returns:
            Tokens and seconds that it adds.
        """
        used = {bet.method for bet in bets if bet is not None}
        for method in methods:
            self._idle[method.method] = 0 if method.method in used else self._idle.get(method.method, 0) + 1
        self._credit += self._probe_share * float(seconds[0])
        free = np.array([bet is None for bet in bets])
        idle = [
            method for method in methods if self._idle[method.method] and free[method.rows].any() and len(method.node)
        ]
        if not idle:
            return 0.0, 0.0
        method = max(idle, key=lambda method: self._idle[method.method])
        candidates, guesses = method.candidates, sum(len(bet.tree) for bet in bets if bet is not None)
        worth = np.bincount(candidates.tree, candidates.value, len(method.rows)) - rate * candidates.own
        worth[~free[method.rows]] = -np.inf
        bought = np.flatnonzero(candidates.tree == np.argmax(worth))[:PROBE_GUESSES]
        if not len(bought) or guesses + len(bought) >= len(seconds):
            return 0.0, 0.0
        tokens = float(candidates.value[bought].sum())
        time = float(
            candidates.level_costs[candidates.depth[bought].max()]
            + candidates.own[np.argmax(worth)]
            + candidates.cost.per_guess * len(bought)
            + seconds[guesses + len(bought)]
            - seconds[guesses]
        )
        price = time - tokens / rate
        self._credit = min(self._credit, max(2 * price, float(seconds[0])))  # nothing is hoarded for later
        if price > self._credit:
            return 0.0, 0.0
        self._credit -= max(0.0, price)
        ((row, bet),) = method.bets(np.isin(np.arange(len(method.node)), bought))
        bets[row] = bet
        self._idle[method.method] = 0
        return tokens, time

    # ---- observe ----------------------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        self._step += 1
        guesses = 0
        for row, got in zip(rows, result.rows, strict=True):
            self._seen[row.seq] = self._step
            if got.method is not None and got.tree:
                guesses += len(got.tree)
                acceptance = self.acceptance.setdefault(got.method, MethodAcceptance())
                acceptance.observe(row.seq, Trials.of(got.tree, got.accepted))
            for name, acceptance in self.acceptance.items():
                if name != got.method:
                    acceptance.fade(row.seq)
        self._observe_time(_Load.of(rows), guesses, rows, result)
        if self._step % 1000 == 0:
            self._forget()

    def _observe_time(self, load: _Load, guesses: int, rows: Sequence[PolicyRow], result: StepResult) -> None:
        seconds = dict(result.seconds)
        verify, draft = seconds.pop("verify", 0.0), seconds.pop("draft", 0.0)
        self.verify_scale.observe(float(self.profile.verify(load.new + guesses, load.rows, load.context)), verify)
        self.host_scale.observe(self.profile.host(load.rows, guesses), sum(seconds.values()))
        expected = 0.0
        for method in {got.method for got in result.rows if got.method is not None}:
            bet = [(row, got.tree) for row, got in zip(rows, result.rows, strict=True) if got.method == method]
            expected += self.profile.draft(method)(
                max(tree.depth for _, tree in bet),
                len(bet),
                sum(len(tree) for _, tree in bet),
                sum(r.start for r, _ in bet),
            )
        self.draft_scale.observe(expected, draft)

    def _forget(self) -> None:
        """Drops requests that have not been seen for long."""
        gone = [seq for seq, step in self._seen.items() if step < self._step - 1000]
        for seq in gone:
            del self._seen[seq]
            for acceptance in self.acceptance.values():
                acceptance.forget(seq)


def _weighted(candidates: Candidates, weights: Floats) -> Candidates:
    c = candidates
    return Candidates(c.rows, c.own, c.tree, c.depth, c.value * weights[c.rows[c.tree]], c.cost)
