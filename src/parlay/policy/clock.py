"""What steps take here and now: a profile, and what serving has taught about it since."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parlay.policy.base import PolicyRow
from parlay.policy.cost import DraftCost, Profile
from parlay.policy.live import LiveCurve, LiveScale
from parlay.policy.trees import Floats
from parlay.types import StepResult

SLOW = 20.0  # times as long as expected is worth a line in the log
AGAIN = 256  # steps between two such lines
MOVED = 0.7  # of the logarithm of what all passes have in common: worth a line as well

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """What a step does beside verifying guesses.

    Attributes:
        rows: In it.
        new: Known tokens that run.
        context: Tokens in KV by then.
        sampled: Rows that sample.
    """

    rows: int
    new: int
    context: int
    sampled: int = 0


@dataclass(slots=True)
class _Drafted:
    """What one drafter did in a step."""

    rows: int = 0
    levels: int = 0
    guesses: int = 0
    context: int = 0
    catch_up: int = 0
    drawn_rows: int = 0  # those that sample, and the same of them
    drawn_levels: int = 0
    drawn_guesses: int = 0


class Clock:
    """Predicts seconds and learns from those of every step.

    Args:
        profile: What steps cost as it was once measured.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.verify, self.host = LiveCurve(), LiveScale()
        self.drafting, self.catching_up = LiveScale(), LiveScale(memory=5.0)
        self._told, self._quiet = 0.0, 0  # the logarithm that the log knows; steps before the next line about slow ones

    def seconds(self, load: Load, room: int) -> Floats:
        """[room + 1] seconds of a step by its guesses, without the drafters'."""
        guesses = np.arange(room + 1.0)
        new = load.new + guesses
        passes = self.profile.verify(new, load.rows, load.context) * self.verify.factors(new)
        return passes + self.host.factor * self.profile.around(load.rows, guesses, load.sampled)

    def draft(self, method: str, sampled_share: float = 0.0) -> DraftCost:
        """What a drafter takes, and betting on its guesses, where such a share of the rows samples."""
        cost = self.profile.draft(method)
        found = replace(cost.scaled(self.drafting.factor), per_catch_up=self.catching_up.factor * cost.per_catch_up)
        if not sampled_share:
            return found
        drawing, choosing = self.profile.sampled(method)
        drawing, choosing = drawing.scaled(self.drafting.factor), choosing.scaled(self.host.factor)
        return found + (drawing + choosing).shared(sampled_share)

    def learnt(self) -> Profile:
        """The profile as it has turned out to be."""
        verify, knots = self.profile.verify, np.array(self.profile.verify.knots, dtype=np.float64)
        seconds = np.maximum.accumulate(np.array(verify.seconds) * self.verify.factors(knots))
        scale = self.verify.scale.factor
        return replace(
            self.profile,
            verify=replace(
                verify,
                seconds=tuple(seconds.tolist()),
                per_row=scale * verify.per_row,
                per_context=scale * verify.per_context,
                per_pair=scale * verify.per_pair,
            ),
            drafts={method: self.draft(method) for method in self.profile.drafts},
            host=self.profile.host.scaled(self.host.factor),
            sampling=self.profile.sampling.scaled(self.host.factor),
            drawing={name: cost.scaled(self.drafting.factor) for name, cost in self.profile.drawing.items()},
            choosing=self.profile.choosing.scaled(self.host.factor),
        )

    def observe(self, rows: Sequence[PolicyRow], result: StepResult, catch_up: Mapping[int, int] | None) -> float:
        """Learns from the times of a step, and says what it would have taken without guesses, in seconds.

        That is 0 where the times cannot be true, and nothing is learnt then.

        Args:
            rows: Of the step.
            result: What became of them, and seconds by part.
            catch_up: By row, tokens that its drafter had to read first; None where that is not known of all of them,
                and then nothing is learnt about drafting.
        """
        parts = dict(result.seconds)
        if not all(0 <= some < math.inf for some in parts.values()):
            logger.warning("the clock jumped: nothing is learnt from a step of %s s", sum(parts.values()))
            return 0.0
        verify, draft, host = parts.pop("verify", 0.0), parts.pop("draft", 0.0), sum(parts.values())
        drafted: defaultdict[str, _Drafted] = defaultdict(_Drafted)
        new = known = guesses = sampled = 0
        for row, got in zip(rows, result.rows, strict=True):
            new, known = new + row.count, known + row.start + row.count
            sampled += row.samples and not row.is_greedy
            if got.method is not None and got.tree.parents:
                some, size = drafted[got.method], len(got.tree.parents)
                some.rows, some.guesses, guesses = some.rows + 1, some.guesses + size, guesses + size
                some.levels = max(some.levels, got.tree.depth)
                some.context += row.start
                some.catch_up += catch_up.get(row.seq, 0) if catch_up else 0
                if not row.is_greedy:
                    some.drawn_rows, some.drawn_guesses = some.drawn_rows + 1, some.drawn_guesses + size
                    some.drawn_levels = max(some.drawn_levels, got.tree.depth)
        count, profile = len(rows), self.profile
        plain = profile.verify.at(new, count, known)
        off = plain * self.verify.factor(new) + self.host.factor * profile.around(count, 0.0, sampled)
        passed = profile.verify.at(new + guesses, count, known) if guesses else plain
        self.verify.observe(passed, verify, new + guesses)
        guessing = reading = 0.0
        drawn = _Drafted()  # by all methods together
        for method, some in drafted.items():
            cost = profile.draft(method)
            guessing += cost(some.levels, some.rows, some.guesses, some.context)
            reading += cost.per_catch_up * some.catch_up
            if some.drawn_rows and method in profile.drawing:
                guessing += profile.drawing[method](some.drawn_levels, some.drawn_rows, some.drawn_guesses, 0)
                drawn.levels = max(drawn.levels, some.drawn_levels)
                drawn.rows, drawn.guesses = drawn.rows + some.drawn_rows, drawn.guesses + some.drawn_guesses
        choosing = profile.choosing(drawn.levels, drawn.rows, drawn.guesses, 0) if drawn.rows else 0.0
        self.host.observe(profile.around(count, guesses, sampled) + choosing, host)
        if catch_up is None:
            pass
        elif reading > guessing:
            self.catching_up.observe(reading, draft - self.drafting.factor * guessing)
        elif not reading:
            self.drafting.observe(guessing, draft)
        self._tell(verify, passed * self.verify.factor(new + guesses))
        return off

    def _tell(self, measured: float, expected: float) -> None:
        """Says in the log when a pass was odd, or when all of them have become slower or faster."""
        self._quiet -= 1
        if measured > SLOW * expected and self._quiet <= 0:
            self._quiet = AGAIN
            logger.warning(
                "a pass took %.3g s where %.3g s were expected; a single one changes little", measured, expected
            )
        now = math.log(self.verify.scale.factor)
        if abs(now - self._told) > MOVED:
            self._told = now
            logger.info("passes take %.2g times as long as was measured at first", math.exp(now))
