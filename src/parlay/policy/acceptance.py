"""How often guesses are accepted: estimates per method, position and request, and how far they can be trusted.

What is counted is how often a guess was accepted among those that were tried: children of accepted nodes, in order, up
to the one that was accepted. Guesses behind a rejection, and younger siblings of an accepted guess, were never tried
and count for nothing. Accepted over drafted, as it is often reported, falls with the length of the guesses even where
every guess is equally good; this does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from parlay.bets import Tree
from parlay.policy.trees import Floats, Ints, child_ranks

LEVELS = 16  # deeper guesses are taken for as good as those of the last level
RANKS = 8  # children beyond it are taken for never accepted
CERTAIN = 0.99  # no estimate is higher
HOPE = 0.02  # nor lower, for a rank that had any chance at first: what is never tried can never become better
LEAST_WEIGHT, MOST_WEIGHT = 2.0, 60.0  # expected acceptances that the pool weighs against a request's own
FADE = 0.99  # of what is known of a request, in a step
AGE = 0.98  # of what was seen of a method lately, in a step
LATELY = 10.0  # trials of it that are left after a long time
BELIEF = 10.0  # trials that the long run weighs against them
EVERY = 16  # steps, after which what ages is made older
REFRESH = 512  # outcomes that an estimate leaves out at most
PER_OCTAVE, LOWEST, HIGHEST = 8, -3, 1  # factors of requests are told apart by 9%, from 1/8 to 2
FACTORS = 2.0 ** (np.arange(PER_OCTAVE * (HIGHEST - LOWEST) + 1) / PER_OCTAVE + LOWEST)


@dataclass(frozen=True, slots=True)
class Trials:
    """Which guesses of one row were tried, and which of them accepted: (level from 0, rank among siblings).

    Levels beyond the last one that is told apart count as that one; ranks beyond it are left out.
    """

    tried: tuple[tuple[int, int], ...]
    accepted: tuple[tuple[int, int], ...]

    @staticmethod
    @lru_cache(maxsize=4096)  # the same few walks down the same few trees come again and again
    def of(tree: Tree, accepted: tuple[int, ...]) -> Trials:
        """From a verified tree and the nodes of its accepted path, root side first."""
        ranks, children = child_ranks(tree).tolist(), tree.children()
        won = [(level, ranks[node]) for level, node in enumerate(accepted)]
        last = (len(won), len(children.get(accepted[-1] if accepted else -1, ())) - 1)  # whose children all failed
        tried = [(level, rank) for level, most in (*won, last) for rank in range(most + 1)]
        return Trials(_told_apart(tried), _told_apart(won))


def _told_apart(guesses: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((min(level, LEVELS - 1), rank) for level, rank in guesses if rank < RANKS)


class Acceptance(Protocol):
    """How often one method's guesses are accepted, request by request."""

    @property
    def matrices(self) -> Floats:
        """[groups, levels, ranks]: for requests of each group, a distribution over every node's children.

        The array is another one whenever its values are.
        """
        ...

    def groups(self, seqs: Sequence[int]) -> Ints:
        """[requests] the group of each."""
        ...

    def group(self, seq: int) -> int:
        """The group of one."""
        ...

    def observe(self, seq: int, trials: Trials) -> None:
        """Learns from one row of one step."""
        ...

    def tick(self) -> None:
        """A step is over, whoever bet in it."""
        ...

    def forget(self, seq: int) -> None:
        """A request has ended."""
        ...


class MethodAcceptance:
    """One method's acceptance by level and rank, and every request's factor to it.

    Estimated is how likely a guess is accepted once it is tried, so that the acceptances of siblings, each the product
    of that and of the elder ones' failures, sum to less than 1 by themselves. Three estimates, each the prior of the
    next, so that little data changes little: a rank for as long as can be remembered, a rank lately, a rank at this
    level lately. What was seen lately counts less with every outcome and with every step, down to ten trials: of a
    method that is off little is seen, and a dozen good probes must outweigh what was true before.

    A request differs from the pool by one factor: its accepted guesses over those that the pool led to expect, with a
    few expected ones added to both. The pool's own counts are divided by the factors of the requests that they are of;
    otherwise deep levels, which mostly good requests reach, would pass for good levels.

    Args:
        prior: [ranks] acceptance before anything is known; further ranks get half of the last one's, a quarter, ...
        memory: Accepted nodes, or trials of a rank, after which an old one counts a third; where a step brings few of
            them, what was seen lately ages faster.
        pool_weight: Trials that an estimate weighs against those of the next one.
        row_weight: Expected acceptances that the pool weighs against a request's own, until it is known how much
            requests differ.

    Attributes:
        reliability: What it predicted of guesses that were tried, against what happened.
    """

    def __init__(
        self,
        prior: Sequence[float] = (0.5, 0.1, 0.05, 0.03),
        *,
        memory: float = 2000.0,
        pool_weight: float = 20.0,
        row_weight: float = 4.0,
    ) -> None:
        self._believed = once_tried(_extended(prior))  # by rank
        self._hopeful = np.array(self._believed) > 0
        self._tries = [pool_weight] * RANKS  # that this stands on, the prior's own included
        self._pool_weight, self._row_weight = pool_weight, row_weight
        self._memory, self._growth = memory, memory / (memory - 1.0)
        self._weight = 1.0  # of a new outcome: that it grows makes the old ones fade
        self._rank_tried, self._rank_accepted = [0.0] * RANKS, [0.0] * RANKS
        self._tried = [[0.0] * RANKS for _ in range(LEVELS)]
        self._accepted = [[0.0] * RANKS for _ in range(LEVELS)]
        self._slots: dict[int, int] = {}  # seq -> its place in the four lists below; the first is nobody's
        self._free: list[int] = []
        self._own_accepted, self._own_expected = [0.0], [0.0]
        self._heard = [0]  # the time until which these hold
        self._group = [_nearest(np.ones(1)).item()]
        self._time = 0
        self._matrices: Floats | None = None
        self._unheard = 0  # outcomes that the pool does not show yet
        self.reliability = Reliability()
        self.trials = 0  # of all time
        self._hear()

    @property
    def pool(self) -> Floats:
        """[LEVELS, RANKS]: how likely a guess is accepted once it is tried, for a request like the others."""
        if self._unheard >= self._patience:
            self._hear()
        return self._pool

    @property
    def matrices(self) -> Floats:
        """See `Acceptance.matrices`."""
        if self._unheard >= self._patience:
            self._hear()
        if self._matrices is None:
            self._matrices = acceptance(np.minimum(self._pool * FACTORS[:, None, None], CERTAIN))
        return self._matrices

    def _hear(self) -> None:
        """Brings the pool up to date."""
        prior, long = self._pool_weight * self._weight, BELIEF * self._weight
        believed = np.minimum(self._believed, CERTAIN)
        rank = (np.array(self._rank_accepted) + long * believed) / (np.array(self._rank_tried) + long)
        tried, accepted = np.array(self._tried), np.array(self._accepted)
        found = (accepted + prior * np.minimum(rank, CERTAIN)) / (tried + prior)
        self._pool = np.clip(found, np.where(self._hopeful, HOPE, 0.0), CERTAIN)
        self._likely = self._pool.tolist()
        self._matrices, self._unheard = None, 0

    @property
    def _patience(self) -> float:
        """Outcomes that the pool may leave out: the more it has seen, the less they change."""
        return min(REFRESH, 0.01 * self.trials) if self._unheard else 1

    def factor(self, seq: int) -> float:
        """How much more of this request's guesses are accepted than of the others'."""
        return self._factor(self._slots.get(seq, 0))

    def _factor(self, slot: int) -> float:
        trust = FADE ** (self._time - self._heard[slot])  # what it did long ago says less and less of it
        weight = self._row_weight
        return (self._own_accepted[slot] * trust + weight) / (self._own_expected[slot] * trust + weight)

    def groups(self, seqs: Sequence[int]) -> Ints:
        """See `Acceptance.groups`: requests of about the same factor, so that what follows from it is computed once."""
        get, group = self._slots.get, self._group
        return np.array([group[get(seq, 0)] for seq in seqs], dtype=np.intp)

    def group(self, seq: int) -> int:
        """See `Acceptance.group`."""
        return self._group[self._slots.get(seq, 0)]

    def matrix(self, seq: int) -> Floats:
        """[LEVELS, RANKS]: the acceptance of one request."""
        return self.matrices[self.groups([seq])[0]]

    def observe(self, seq: int, trials: Trials) -> None:
        """Learns from one row of one step."""
        if not trials.tried:
            return
        if self._unheard >= self._patience:
            self._hear()
        slot = self._slots.get(seq)
        if slot is None:
            slot = self._slots[seq] = self._place()
        factor, won = self._factor(slot), trials.accepted
        self._weight *= self._growth ** (len(won) + 1)
        expected = 0.0
        for level, rank in trials.tried:
            likely = self._likely[level][rank]
            weight = min(factor, CERTAIN / likely) if likely else factor
            self._rank_tried[rank] += self._weight * weight
            self._tried[level][rank] += self._weight * weight
            expected += likely
            accepted = (level, rank) in won
            self._tries[rank] = min(self._tries[rank] + 1, self._memory)
            self._believed[rank] += (accepted - weight * self._believed[rank]) / self._tries[rank]
            self.reliability.observe(min(likely * factor, CERTAIN), accepted)
        for level, rank in won:
            self._rank_accepted[rank] += self._weight
            self._accepted[level][rank] += self._weight
        keep = FADE ** (self._time - self._heard[slot]) * 0.98 ** (len(won) + 1)  # a text changes, too
        own_accepted = self._own_accepted[slot] = keep * self._own_accepted[slot] + len(won)
        own_expected = self._own_expected[slot] = keep * self._own_expected[slot] + expected
        self._heard[slot] = self._time + 1
        octaves = math.log2((own_accepted + self._row_weight) / (own_expected + self._row_weight))
        self._group[slot] = min(max(round(PER_OCTAVE * (octaves - LOWEST)), 0), len(FACTORS) - 1)
        self._unheard += 1
        self.trials += len(trials.tried)
        if self._weight > 1e6:
            self._rescale()

    def _rescale(self) -> None:
        """Brings all counts back to a new outcome's weight of 1."""
        for counts in (self._rank_tried, self._rank_accepted, *self._tried, *self._accepted):
            counts[:] = [count / self._weight for count in counts]
        self._weight = 1.0

    def tick(self) -> None:
        """See `Acceptance.tick`."""
        self._time += 1
        if self._time % EVERY == 0:
            self._age()  # and those that were not heard of come nearer to the others:
            trust = FADE ** (self._time - np.array(self._heard))
            accepted, expected = np.array(self._own_accepted) * trust, np.array(self._own_expected) * trust
            self._weigh_requests(accepted, expected)
            self._group = _nearest((accepted + self._row_weight) / (expected + self._row_weight)).tolist()

    def _age(self) -> None:
        """Lets what was seen lately count less, down to a few trials, which only newer ones can outweigh."""
        if self._rank_tried[0] > LATELY * self._weight:
            self._weight *= AGE**-EVERY
            if self._weight > 1e6:
                self._rescale()
        self._hear()

    def _weigh_requests(self, accepted: Floats, expected: Floats) -> None:
        """Sets how much a request's own outcomes count by how much requests differ.

        Were they all alike, a request's accepted guesses would differ from what is expected by chance alone. What they
        differ more is the variance of their factors (empirical Bayes, by the method of moments). accepted, expected:
        [requests].
        """
        told = expected > 3
        if told.sum() < 4:
            return
        accepted, expected = accepted[told], expected[told]
        chance = 1 - float(self.pool[0, 0])  # variance of an accepted count over its mean, halved as old ones fade
        spread = float((np.square(accepted - expected) - 0.6 * chance * expected).sum() / np.square(expected).sum())
        wanted = min(max(chance / max(spread, 1e-6), LEAST_WEIGHT), MOST_WEIGHT)
        self._row_weight += 0.2 * (wanted - self._row_weight)

    def forget(self, seq: int) -> None:
        """See `Acceptance.forget`."""
        slot = self._slots.pop(seq, None)
        if slot is not None:
            self._own_accepted[slot] = self._own_expected[slot] = 0.0
            self._free.append(slot)

    def _place(self) -> int:
        """A place for a request that nothing is known of."""
        if self._free:
            return self._free.pop()
        self._own_accepted.append(0.0)
        self._own_expected.append(0.0)
        self._heard.append(0)
        self._group.append(self._group[0])
        return len(self._group) - 1


def _nearest(factors: Floats) -> Ints:
    """Places in FACTORS; any shape."""
    octaves = np.log2(factors)
    return np.clip(np.rint(PER_OCTAVE * (octaves - LOWEST)), 0, len(FACTORS) - 1).astype(np.intp)


def _extended(prior: Sequence[float]) -> list[float]:
    """[RANKS]: a prior for every rank, since what is given no chance is never tried."""
    found = list(prior)[:RANKS]
    while len(found) < RANKS:
        found.append(min(found[-1], 1 - sum(found)) / 2)
    return found


def once_tried(acceptance: Sequence[float]) -> list[float]:
    """[ranks]: how likely each sibling is accepted if none before it was."""
    left, found = 1.0, []
    for p in acceptance:
        found.append(min(CERTAIN, p / left) if left > 1e-9 else 0.0)
        left -= p
    return found


def acceptance(once_tried: Floats) -> Floats:
    """[..., ranks]: how likely each sibling is the accepted one; the inverse of `once_tried`."""
    if once_tried.shape[-1] == 1:
        return once_tried
    failed = np.cumprod(1 - once_tried, axis=-1)
    return once_tried * np.concatenate([np.ones_like(failed[..., :1]), failed[..., :-1]], axis=-1)


# ---- calibration ----------------------------------------------------------------------------------------------------


class Reliability:
    """Predicted acceptance against what happened, in bins of the prediction.

    Args:
        bins: How many, of equal width.
    """

    def __init__(self, bins: int = 10) -> None:
        self._bins = [[0, 0.0, 0] for _ in range(bins)]  # guesses, the sum of predictions, accepted

    def observe(self, predicted: float, accepted: bool) -> None:
        some = self._bins[min(int(predicted * len(self._bins)), len(self._bins) - 1)]
        some[0] += 1
        some[1] += predicted
        some[2] += accepted

    @property
    def curve(self) -> list[Mapping[str, float]]:
        """Per bin that holds anything: mean prediction, share accepted, number of guesses."""
        return [
            {"predicted": predicted / count, "accepted": accepted / count, "guesses": count}
            for count, predicted, accepted in self._bins
            if count
        ]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of a guess's bin from the diagonal."""
        off = sum(abs(predicted - accepted) for _, predicted, accepted in self._bins)
        return off / max(sum(count for count, _, _ in self._bins), 1)
