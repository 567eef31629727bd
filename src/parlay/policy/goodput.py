"""The closed loop: bets what gives most tokens per second now, by what steps cost and guesses earned so far.

It follows SmartSpec (Liu et al. 2024, arXiv 2406.14066) in its objective and its loop, and decides for every row which
method to bet on, how deep, with what tree, or not at all; see `parlay.policy.allocation`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parlay.policy.acceptance import MethodAcceptance, Trials
from parlay.policy.ahead import Ahead, HeadStart
from parlay.policy.allocation import LINES, Allocation, Candidates, Guesses, allocate, best_rate, no_bets
from parlay.policy.base import PolicyRow
from parlay.policy.clock import Clock, Load
from parlay.policy.control import Control
from parlay.policy.cost import Profile
from parlay.policy.offers import Drafter, Made, MethodOffers, Rows
from parlay.policy.probing import Prober
from parlay.policy.quick import FEW, Quick
from parlay.policy.trees import Floats, overlap
from parlay.types import Offer, RowResult, StepPlan, StepResult

PRIOR = (0.5, 0.1, 0.05, 0.03)
FRESH = 16  # plans after which all methods, lines and prices are looked at again, as when the load changes
MANY = 4  # rows from which on looking at guesses that cost nothing to draft takes too long to do it every time
ROOM = 16  # guesses of a row that quick plans look at, at least
FORGET = 1000  # steps after which a request that was not seen is forgotten


@dataclass(frozen=True, slots=True)
class Expected:
    """What a plan was expected to bring, for comparison with what it brought: tokens, seconds, seconds without bets."""

    emitted: float
    seconds: float
    seconds_off: float


NOTHING = Expected(0.0, 0.0, 0.0)


class Goodput:
    """Maximises tokens per second over method, depth, tree and off, row by row.

    Args:
        profile: What steps cost; corrected while serving.
        margin: How much better than no bet a plan must look, as a share, before betting starts again: at most this,
            and no more than half the spread of steps' times.
        probe_share: Share of the time that may be spent on finding out whether a method that is off has become good.
        control_share: Share of the time that may be lost by plain steps between bets.
        horizon: Steps over which it spreads what it costs to bring a drafter up to date.
        priors: By method, acceptance by rank before anything is known.

    Attributes:
        clock: What steps take.
        control: Whether bets have paid.
        drafters: What is known of each method; learnt, unless something was put there before.
        expected: What the last plan was expected to bring, apart from rows with bets of their own; `NOTHING` where it
            was only to read prompts.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        margin: float = 0.03,
        probe_share: float = 0.005,
        control_share: float = 0.003,
        horizon: float = 32.0,
        priors: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.clock = Clock(profile)
        self.control = Control(control_share)
        self.drafters: dict[str, Drafter] = {}
        self.expected = NOTHING
        self._priors = dict(priors or {})
        self._margin, self._horizon = margin, horizon
        self._prober = Prober(probe_share)
        self._betting = False
        self._line = LINES[0]
        self._bucket = -1  # of the number of rows that emit, four to an octave
        self._rates: dict[int, float] = {}  # tokens per second of a row, by that
        self._worth: dict[str, int] = {}  # method -> the last plan that bet on it
        self._resting: set[str] = set()  # methods that are not looked at before the next fresh plan
        self._telling: set[str] = set()  # methods whose guesses trees of others take in
        self._hidden: frozenset[str] = frozenset()  # those whose offers this plan does not see
        self._again = False  # the next plan is a fresh one
        self._quick: Quick | None = None  # for a few rows, until the next fresh plan
        self._made: dict[int, Made] = {}  # seq -> its bet in the last plan
        self._ahead = Ahead()
        self._begun: HeadStart | None = None  # what the last plan was instead
        self._probing = False  # whether it was to find something out
        self._seen: dict[int, int] = {}  # seq -> step
        self._step = self._plans = 0

    # ---- plan -------------------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        self._made, self._begun = {}, None
        emitting = sum(row.samples for row in rows)
        if not any(row.samples and row.max_depth > 0 for row in rows):  # nothing to decide: what it knows stays
            self.expected = NOTHING
            return StepPlan((None,) * len(rows), resting=self._hidden)
        beginning = [[offer for offer in some if offer.ahead] for some in offers]
        if any(beginning):
            offers = [[offer for offer in some if not offer.ahead] for some in offers]
        self._plans += 1
        bucket = int(4 * math.log2(emitting))
        changed, known = bucket != self._bucket, not self._hidden
        fresh = changed or self._plans % FRESH == 0 or (self._again and known)
        self._again = fresh and not known  # some offers were not made, as nobody was expected to look at them
        self._bucket = bucket
        quick, few = self._quick, len(rows) <= FEW and all(_only_decodes(row) for row in rows)
        if quick is not None and few and not fresh and quick.emitting == emitting:
            self._plan_quickly(quick, rows, offers, budget)
        else:
            self._plan_whole(rows, offers, budget, fresh=fresh, few=few)
        expected, price = self.expected, self._rates[bucket] * emitting
        advantage = (expected.emitted - emitting) / price - (expected.seconds - expected.seconds_off)
        plain = self.control.due(expected.seconds_off, advantage)
        if plain:
            self._made = {}
            self.expected = Expected(float(emitting), expected.seconds_off, expected.seconds_off)
        soon = self._again or (self._plans + 1) % FRESH == 0 or any(_wishes(row) for row in rows)
        hears = any(row.is_greedy and self._method(row) not in (None, *self._telling) for row in rows)
        asleep = self._resting - self._telling if hears else self._resting
        self._hidden = frozenset() if soon else frozenset(asleep)
        if all(beginning) and not (plain or self._probing):
            self._begun = self._better(rows, beginning)
        if self._begun is not None:
            self._made = {}
            self.expected = replace(self.expected, emitted=float(emitting), seconds=self._begun.seconds)
            return StepPlan((self._begun.bet,) * len(rows), resting=self._hidden)
        bets = tuple(made.bet if (made := self._made.get(row.seq)) else None for row in rows)
        return StepPlan(bets, resting=self._hidden)

    def _method(self, row: PolicyRow) -> str | None:
        """Whose guesses it gets."""
        made = self._made.get(row.seq)
        return made.bet.method if made is not None else None

    def _better(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]]) -> HeadStart | None:
        """Beginning next tokens, where that is expected to bring more than what was planned."""
        if not all(map(_only_decodes, rows)):
            return None
        found, planned = (
            self._ahead.best(rows, offers, self.clock.profile.draft, self.expected.seconds_off),
            self.expected,
        )
        if found is None or len(rows) / found.seconds <= planned.emitted / planned.seconds:
            return None
        return found

    def _plan_quickly(
        self, quick: Quick, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int
    ) -> None:
        """Plans for a few rows much as in the last whole plan."""
        self._probing = False
        known = self._rates[self._bucket] * len(rows)
        made, tokens, seconds = quick.plan(rows, offers, self.drafters, known, budget)
        rate, off = tokens / seconds, len(rows) / quick.seconds[0]
        if not self._pays(rate, off):
            made, tokens, seconds, rate = [], float(len(rows)), quick.seconds[0], off
        self._rates[self._bucket] += 0.1 * (rate / len(rows) - self._rates[self._bucket])
        for row, some in zip(rows, made, strict=False):
            if some is not None:
                self._made[row.seq] = some
                self._worth[some.bet.method] = self._plans
        self._prober.save(quick.seconds[0])
        self.expected = Expected(tokens, seconds, quick.seconds[0])

    def _plan_whole(
        self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int, *, fresh: bool, few: bool
    ) -> None:
        """Plans for all rows together."""
        step = Rows.of(rows)
        emitting = int(step.samples.sum())
        methods = self._offers(step, offers, () if fresh or step.wishes else self._resting)
        candidates = [method.candidates for method in methods]
        room = min(budget, len(rows) * max((some.most for some in candidates), default=0))
        load, plain = _loads(step, emitting)
        seconds = self.clock.seconds(plain, room)
        found, price = self._at_best_rate(candidates, len(rows), seconds, emitting, fresh)
        for method, bought in zip(methods, found.guesses, strict=True):
            if len(bought.value):
                self._worth[method.method] = self._plans
        if fresh:
            self._telling |= {offer.method for some in offers for offer in some if offer.shows_odds}
            idle = (method for method in methods if self._plans - self._worth.get(method.method, -FRESH) >= FRESH)
            self._resting = {m.method for m in idle if emitting >= MANY or m.candidates.pays_for_levels}
        if load != plain:
            seconds = self.clock.seconds(load, room)
            found = no_bets(candidates, len(rows), emitting, seconds)
            if self._betting:
                found = allocate(candidates, len(rows), emitting, seconds, price, (self._line,))
        if step.wishes:
            found = self._wished(rows, step, candidates, seconds, price, found)
        tokens, time = float(emitting), found.seconds
        probe = self._prober.probe(methods, found, seconds, price, fresh)
        self._probing = probe is not None
        for place, (method, bought) in enumerate(zip(methods, found.guesses, strict=True)):
            if len(bought.value):
                tokens += float(bought.value.sum())
                self._make(method, bought, step)
            if probe is not None and probe.method == place:
                tokens, time = tokens + probe.tokens, time + probe.seconds
        if probe is not None:
            self._make(methods[probe.method], probe.bought, step)
        self.expected = Expected(tokens, time, float(seconds[0]))
        self._quick = self._shortened(step, budget, plain) if few else None

    def _shortened(self, step: Rows, budget: int, load: Load) -> Quick:
        """This plan as a start for quick ones."""
        rows, share = len(step.seqs), step.sampled_share
        room = min(budget, rows * max((len(made.offer.tree) for made in self._made.values()), default=ROOM))
        return Quick(
            seconds=self.clock.seconds(load, max(room, min(budget, rows * ROOM))).tolist(),
            emitting=rows,
            costs={name: self.clock.draft(name, share) for name in self.drafters.keys() - self._resting},
            horizon=self._horizon,
            sharing=dict(Counter(made.bet.method for made in self._made.values())),
            sizes={seq: len(made.bet.tree) for seq, made in self._made.items()},
        )

    def _offers(self, step: Rows, offers: Sequence[Sequence[Offer]], resting: Collection[str]) -> list[MethodOffers]:
        """What is on offer, by method, but for those that rest."""
        by_method: defaultdict[str, list[tuple[int, Offer]]] = defaultdict(list)
        for place, (some, deepest) in enumerate(zip(offers, step.deepest.tolist(), strict=True)):
            if deepest > 0:
                for offer in some:
                    if offer.method not in resting:
                        by_method[offer.method].append((place, offer))
        found, able = [], int((step.deepest > 0).sum())
        for name in self.drafters.keys() - by_method.keys() - self._hidden - {*resting}:
            by_method[name] = []  # nothing to offer, though it was asked
        for name, entries in by_method.items():
            filled = [entry for entry in entries if entry[1].tree.parents]
            if able:
                drafter = self.drafter(name)
                drafter.offered += 0.1 * (len(filled) / able - drafter.offered)
            if filled:
                places, offered = zip(*filled, strict=True)
                cost = self.clock.draft(name, step.sampled_share)
                found.append(MethodOffers.of(self.drafter(name), places, offered, step, cost, self._horizon))
        return found

    def drafter(self, method: str) -> Drafter:
        """What is known of a method."""
        if method not in self.drafters:
            self.drafters[method] = Drafter(method, MethodAcceptance(self._priors.get(method, PRIOR)))
        return self.drafters[method]

    def _at_best_rate(
        self, candidates: Sequence[Candidates], num_rows: int, seconds: Floats, emitting: int, fresh: bool
    ) -> tuple[Allocation, float]:
        """The best bets beside no prompt, and their rate, which is the price of time; no bets where none pay."""
        known = self._rates.get(self._bucket, 0.0) * emitting
        if fresh:
            found = best_rate(candidates, num_rows, emitting, seconds, known)
        else:  # much as in the last plan: one price and one line do
            found = best_rate(candidates, num_rows, emitting, seconds, known, rounds=1, lines=(self._line,))
        self._line = found.line
        rate, off = found.emitted / found.seconds, emitting / float(seconds[0])
        if not self._pays(rate, off):
            found, rate = no_bets(candidates, num_rows, emitting, seconds), off
        self._rates[self._bucket] = rate / emitting
        return found, rate

    def _pays(self, rate: float, off: float) -> bool:
        """Whether to bet, at this rate against that without bets: by more than noise, if it was not done before."""
        margin = 0.0 if self._betting else min(self._margin, 0.5 * self.clock.verify.spread)
        self._betting = rate > off * (1.0 + margin) and not self.control.paused
        return self._betting

    def _wished(
        self,
        rows: Sequence[PolicyRow],
        step: Rows,
        candidates: Sequence[Candidates],
        seconds: Floats,
        price: float,
        found: Allocation,
    ) -> Allocation:
        """The best bets if the tokens of some rows count more.

        A row that asked for the lowest latency counts as all rows together, which makes time as dear as its own rate.
        One that would miss its target counts twice, four times, and so on up to 16 times, until it would not.
        """
        weights = np.ones(len(rows))
        weights[[row.speculation == "max" for row in rows]] = step.samples.sum()
        targets = np.array([row.target_tpot or math.inf for row in rows])
        for _ in range(5):
            if (weights > 1).any():
                weighted = [some.weighted(weights) for some in candidates]
                found = allocate(weighted, len(rows), float(weights[step.samples].sum()), seconds, price)
                found = replace(found, guesses=_counted(candidates, found.guesses, 1 / weights))
            emitted = np.ones(len(rows))
            for some, bought in zip(candidates, found.guesses, strict=True):
                emitted += np.bincount(some.rows[bought.tree], bought.value, len(rows))
            late = step.samples & (found.seconds / emitted > targets)
            if not late.any():
                break
            weights[late] *= 2
        return found

    def _make(self, method: MethodOffers, bought: Guesses, step: Rows) -> None:
        """Notes the bets that these guesses are."""
        for row, made in method.bets(bought):
            self._made[step.seqs[row]] = made

    # ---- observe ----------------------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        self._step += 1
        if all(got.method is not None and not got.tree.parents for got in result.rows):
            # Next tokens were begun, and what such a step took says nothing of plain passes.
            self._seen |= dict.fromkeys((row.seq for row in rows), self._step)
            if self._begun is not None and all(got.method == self._begun.bet.method for got in result.rows):
                self._ahead.observe(self._begun, sum(result.seconds.values()))
            return
        self._ahead.rest()
        told: dict[str, list[tuple[float, bool]]] = {}
        for row, got in zip(rows, result.rows, strict=True):
            self._seen[row.seq] = self._step
            if got.method is not None and got.tree.parents:
                self.drafter(got.method).acceptance.observe(row.seq, Trials.of(got.tree, got.accepted))
                made = self._made.get(row.seq)
                if made is not None and made.offer.confidence is not None:
                    told.setdefault(got.method, []).extend(_told(made, made.offer.confidence, got))
        for method, outcomes in told.items():
            confidence, accepted = zip(*outcomes, strict=True)
            self.drafter(method).confidence.observe(np.array(confidence), np.array(accepted))
        for drafter in self.drafters.values():
            drafter.acceptance.tick()
            if self._step % FRESH == 0:
                drafter.tell()
        own = all(not got.drafted or row.seq in self._made for row, got in zip(rows, result.rows, strict=True))
        late = {seq: made.offer.catch_up for seq, made in self._made.items() if made.offer.catch_up}
        off = self.clock.observe(rows, result, late if own else None)
        if own and all(map(_only_decodes, rows)):  # nothing else explains what a step took: it tells if betting pays
            emitted = sum(len(got.emitted) for got in result.rows)
            guesses = sum(got.drafted for got in result.rows)
            self.control.observe(emitted, len(rows), guesses, sum(result.seconds.values()), off)
        if self._step % FORGET == 0:
            self._forget()

    def _forget(self) -> None:
        """Drops requests that have not been seen for long."""
        gone = [seq for seq, step in self._seen.items() if step < self._step - FORGET]
        for seq in gone:
            del self._seen[seq]
            for drafter in self.drafters.values():
                drafter.acceptance.forget(seq)


def _wishes(row: PolicyRow) -> bool:
    """Whether a row asks for more than its share."""
    return row.speculation == "max" or row.target_tpot is not None


def _only_decodes(row: PolicyRow) -> bool:
    """Whether a row reads nothing but its last token, and asks for no more than its share."""
    return row.samples and row.count == 1 and not _wishes(row)


def _loads(step: Rows, emitting: int) -> tuple[Load, Load]:
    """What the step does anyway, and what it would do without the prompts in it."""
    known = step.start + step.count
    whole = Load(len(step.seqs), int(step.count.sum()), int(known.sum()), step.sampled)
    return whole, Load(emitting, emitting, int(step.start[step.samples].sum()) + emitting, step.sampled)


def _counted(candidates: Sequence[Candidates], guesses: Sequence[Guesses], weights: Floats) -> tuple[Guesses, ...]:
    """The guesses with the tokens of each row counting so much more. weights: [rows]."""
    return tuple(
        Guesses(some.tree, some.node, some.depth, some.value * weights[method.rows[some.tree]])
        for method, some in zip(candidates, guesses, strict=True)
    )


def _told(made: Made, confidence: Sequence[float], got: RowResult) -> list[tuple[float, bool]]:
    """The drafter's word about each child of an accepted node, and whether it was right.

    Which of the children is right is known for all of them once it is for one.
    """
    reached = {-1, *got.accepted}
    return [
        (confidence[made.nodes[node]], place in reached)
        for place, (node, parent) in enumerate(zip(overlap(made.bet.tree, got.tree), got.tree.parents, strict=True))
        if parent in reached
    ]
