"""SmartSpec (Liu et al. 2024, arXiv 2406.14066): one chain length per batch, by predicted goodput.

As its authors' code has it, but for what is wrong there: every length is looked at (a staircase dips), an acceptance of
1 does not divide by zero, acceptance is counted among guesses that were tried, rows without an offer count once, and a
length of 0 is left by a probe, since without guesses no acceptance is ever learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

from parlay.bets import Bet, Tree
from parlay.policy.acceptance import Trials
from parlay.policy.base import PolicyRow
from parlay.policy.cost import Profile
from parlay.policy.fixed import bet_alike
from parlay.types import Offer, StepPlan, StepResult


class SmartSpec:
    """Chooses the length with the highest predicted goodput for the whole batch.

    Args:
        profile: What steps cost.
        method: The drafter's name.
        longest: Longest chain.
        every: Steps for which a choice holds.
        margin: How much better than no guess a length must look, as a share (0.1 in the authors' code).
        probe_every: Choices of no guess after which a length of 1 is tried for one step.
    """

    def __init__(
        self,
        profile: Profile,
        method: str,
        longest: int = 8,
        *,
        every: int = 20,
        margin: float = 0.1,
        probe_every: int = 10,
    ) -> None:
        self.profile, self.method, self.longest = profile, method, longest
        self.acceptance = 0.7  # as the authors begin
        self.length = 0
        self._every, self._margin, self._probe_every = every, margin, probe_every
        self._steps = self._silent = 0
        self._accepted = self._tried = 0.0

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy.plan`."""
        probing = False
        if self._steps % self._every == 0:
            self.length = self._best_length(rows, offers)
            self._silent = 0 if self.length else self._silent + 1
            probing = self._silent >= self._probe_every
        if probing:
            self._silent = 0
        self._steps += 1
        return bet_alike(Bet(self.method, Tree.chain(1 if probing else self.length)), rows, offers, budget)

    def _best_length(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]]) -> int:
        betting = [
            row
            for row, some in zip(rows, offers, strict=True)
            if row.samples and row.max_depth > 0 and any(offer.method == self.method for offer in some)
        ]
        if not betting:
            return 0
        emitting, new = sum(row.samples for row in rows), sum(row.count for row in rows)
        context = sum(row.start + row.count for row in rows)
        read = sum(row.start for row in betting)
        best, chosen = 0.0, 0
        for length in range(self.longest + 1):
            guesses = len(betting) * length
            emitted = emitting + len(betting) * sum(self.acceptance**k for k in range(1, length + 1))
            seconds = float(self.profile.verify(new + guesses, len(rows), context)) + self.profile.host(
                len(rows), guesses
            )
            if length:
                seconds += self.profile.draft(self.method)(length, len(betting), guesses, read)
            rate = emitted / seconds * (1.0 if length else 1.0 + self._margin)
            if rate > best:
                best, chosen = rate, length
        return chosen

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy.observe`."""
        trials = [Trials.of(got.tree, got.accepted) for got in result.rows if got.tree]
        if trials:
            self._tried = 0.98 * self._tried + sum(len(some.tried) for some in trials)
            self._accepted = 0.98 * self._accepted + sum(len(some.accepted) for some in trials)
            self.acceptance = (self._accepted + 0.7 * 4) / (self._tried + 4)
