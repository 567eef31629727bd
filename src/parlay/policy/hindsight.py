"""What other choices would have taken: an estimate, by what steps cost and guesses earned, of the same tokens' time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parlay.policy.acceptance import MethodAcceptance
from parlay.policy.clock import Clock
from parlay.policy.offers import Drafter

OFF = "off"
DEPTHS = (1, 2, 3, 4, 6, 8)  # of the chains that are compared


@dataclass(slots=True)
class Decoded:
    """Steps with equally many rows, none of which read a prompt."""

    steps: int = 0
    context: int = 0  # tokens in KV, over all rows and steps
    emitted: int = 0
    seconds: float = 0.0
    sampled: int = 0  # rows that sample, over all steps

    def add(self, other: Decoded) -> None:
        self.steps += other.steps
        self.context += other.context
        self.emitted += other.emitted
        self.seconds += other.seconds
        self.sampled += other.sampled


def seconds_of_choices(
    clock: Clock, drafters: Mapping[str, Drafter], decoded: Mapping[int, Decoded]
) -> dict[str, float]:
    """Seconds that the same tokens would have taken under each choice that does not adapt: `off`, `METHOD:DEPTH`.

    A method is taken to be on offer as often as it was lately, and its guesses to be as good as those it was bet on,
    which flatters methods that were bet on only where they looked good.

    Args:
        clock: What steps take.
        drafters: What is known of each method.
        decoded: By rows, what was done.
    """
    found = {OFF: sum(some.emitted * _plain(clock, rows, some) / rows for rows, some in decoded.items())}
    for name, drafter in drafters.items():
        known = drafter.acceptance
        if isinstance(known, MethodAcceptance) and known.trials:
            for depth in DEPTHS:
                likely, total = known.pool[:depth, 0].tolist(), 0.0
                for rows, some in decoded.items():
                    emitted, seconds = _chain(clock, drafter, rows, some, likely)
                    total += some.emitted * seconds / emitted
                found[f"{name}:{depth}"] = total
    return found


def _plain(clock: Clock, rows: int, some: Decoded) -> float:
    """Seconds of a step without bets."""
    context = round(some.context / some.steps)
    passed = clock.profile.verify.at(rows, rows, context) * clock.verify.factor(rows)
    return passed + clock.host.factor * clock.profile.around(rows, 0.0, some.sampled / some.steps)


def _chain(clock: Clock, drafter: Drafter, rows: int, some: Decoded, likely: list[float]) -> tuple[float, float]:
    """Tokens and seconds of a step in which every row for which there is an offer gets a chain of such guesses."""
    betting, depth = rows * drafter.offered, len(likely)
    context, sampled = some.context / some.steps, some.sampled / some.steps
    guesses = betting * depth
    earned = sum(itertools.accumulate(likely, lambda survival, p: survival * p))
    profile, new = clock.profile, rows + round(guesses)
    passed = profile.verify.at(new, rows, round(context)) * clock.verify.factor(new)
    host = clock.host.factor * profile.around(rows, guesses, sampled)
    cost = clock.draft(drafter.method, sampled / rows)
    drafted = cost(depth, betting, guesses, context * drafter.offered) if betting else 0.0
    return rows + betting * earned, passed + host + drafted


def regret(seconds: float, others: Iterable[float]) -> float:
    """How much longer than the best of others it took, as a share; below 0 where it was faster than all."""
    return seconds / min(others) - 1.0
