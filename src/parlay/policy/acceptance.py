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

import numpy as np
from numpy.typing import NDArray

from parlay.policy.trees import Floats, child_ranks
from parlay.types import Tree

LEVELS = 16  # deeper guesses are taken for as good as those of the last level
RANKS = 8  # children beyond it are taken for never accepted
CERTAIN = 0.99  # no estimate is higher
HOPE = 0.02  # nor lower, for a rank that had any chance at first: what is never tried can never become better
REFRESH = 64  # outcomes may be told apart by an estimate that has not heard of so many


@dataclass(frozen=True, slots=True)
class Trials:
    """Which guesses of one row were tried, and which of them accepted: (level from 0, rank among siblings)."""

    tried: tuple[tuple[int, int], ...]
    accepted: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tree: Tree, accepted: Sequence[int]) -> Trials:
        """From a verified tree and the nodes of its accepted path, root side first."""
        ranks, families = _families(tree)
        won = tuple((level, ranks[node]) for level, node in enumerate(accepted))
        last = (len(won), families.get(accepted[-1] if accepted else -1, 0) - 1)  # whose children all failed
        return cls(tuple((level, rank) for level, most in (*won, last) for rank in range(most + 1)), won)


@lru_cache(maxsize=4096)
def _families(tree: Tree) -> tuple[list[int], dict[int, int]]:
    """Every node's rank among its siblings, and how many children every inner node has."""
    return child_ranks(tree).tolist(), {node: len(some) for node, some in tree.children().items()}


class MethodAcceptance:
    """One method's acceptance by level and rank, and every request's factor to it.

    Estimated is how likely a guess is accepted once it is tried, so that the acceptances of siblings, each the product
    of that and of the elder ones' failures, sum to less than 1 by themselves. Three estimates, each the prior of the
    next, so that little data changes little: the first word about a rank, a rank at any level, a rank at this level.

    A request differs from the pool by one factor: its accepted guesses over those that the pool led to expect, with a
    few expected ones added to both. The pool's own counts are divided by the factors of the requests that they are of;
    otherwise deep levels, which mostly good requests reach, would pass for good levels.

    Args:
        prior: [ranks] acceptance before anything is known.
        memory: Accepted nodes after which an old one counts a third.
        pool_weight: Trials that the estimate of a rank weighs against those of a level.
        row_weight: Expected acceptances that the pool weighs against a request's own.
    """

    def __init__(
        self,
        prior: Sequence[float] = (0.5, 0.1, 0.05, 0.03),
        *,
        memory: float = 2000.0,
        pool_weight: float = 20.0,
        row_weight: float = 4.0,
    ) -> None:
        self._start = np.array(once_tried([*prior, *[0.0] * RANKS][:RANKS]))
        self._pool_weight, self._row_weight = pool_weight, row_weight
        self._growth = memory / (memory - 1.0)
        self._weight = 1.0  # of a new outcome: that it grows makes the old ones fade
        self._rank_tried, self._rank_accepted = [0.0] * RANKS, [0.0] * RANKS
        self._tried = [[0.0] * RANKS for _ in range(LEVELS)]
        self._accepted = [[0.0] * RANKS for _ in range(LEVELS)]
        self._rows: dict[int, tuple[float, float]] = {}  # seq -> accepted, expected
        self._pool: Floats | None = None
        self._unheard = 0  # outcomes that the pool does not show yet
        self.trials = 0  # of all time

    @property
    def pool(self) -> Floats:
        """[LEVELS, RANKS]: how likely a guess is accepted once it is tried, for a request like the others."""
        if self._pool is None or self._unheard:
            prior = self._pool_weight * self._weight
            rank = (np.array(self._rank_accepted) + prior * self._start) / (np.array(self._rank_tried) + prior)
            tried, accepted = np.array(self._tried), np.array(self._accepted)
            found = (accepted + prior * rank) / (tried + prior)
            self._pool = np.clip(found, np.where(self._start > 0, HOPE, 0.0), CERTAIN)
            self._unheard = 0
        return self._pool

    def factor(self, seq: int) -> float:
        """How much more of this request's guesses are accepted than of the others'."""
        accepted, expected = self._rows.get(seq, (0.0, 0.0))
        return (accepted + self._row_weight) / (expected + self._row_weight)

    def matrix(self, seqs: Sequence[int], levels: int = LEVELS, ranks: int = RANKS) -> Floats:
        """[requests, levels, ranks]: the acceptance of each request, a distribution over every node's children."""
        factors = np.array([self.factor(seq) for seq in seqs])
        return acceptance(np.minimum(self.pool[:levels, :ranks] * factors[:, None, None], CERTAIN))

    def observe(self, seq: int, trials: Trials) -> None:
        """Learns from one row of one step."""
        if not trials.tried:
            return
        pool = self._pool if self._pool is not None and self._unheard < REFRESH else self.pool
        factor = self.factor(seq)
        tried = [(min(level, LEVELS - 1), rank) for level, rank in trials.tried if rank < RANKS]
        won = [(min(level, LEVELS - 1), rank) for level, rank in trials.accepted if rank < RANKS]
        self._weight *= self._growth ** (len(won) + 1)
        expected = 0.0
        for level, rank in tried:
            likely = float(pool[level, rank])
            weight = self._weight * min(factor, CERTAIN / max(likely, 1e-9))
            self._rank_tried[rank] += weight
            self._tried[level][rank] += weight
            expected += likely
        for level, rank in won:
            self._rank_accepted[rank] += self._weight
            self._accepted[level][rank] += self._weight
        before = self._rows.get(seq, (0.0, 0.0))
        fade = 0.98 ** (len(won) + 1)  # a text changes, too
        self._rows[seq] = fade * before[0] + len(won), fade * before[1] + expected
        self._unheard += 1
        self.trials += len(tried)
        if self._weight > 1e6:
            self._rescale()

    def _rescale(self) -> None:
        """Brings all counts back to a new outcome's weight of 1."""
        for counts in (self._rank_tried, self._rank_accepted, *self._tried, *self._accepted):
            counts[:] = [count / self._weight for count in counts]
        self._weight = 1.0

    def fade(self, seq: int) -> None:
        """A step without guesses of this method: what a request did long ago says less and less of it."""
        if seq in self._rows:
            accepted, expected = self._rows[seq]
            self._rows[seq] = 0.99 * accepted, 0.99 * expected

    def forget(self, seq: int) -> None:
        """A request has ended."""
        self._rows.pop(seq, None)


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


# ---- confidence -----------------------------------------------------------------------------------------------------


class ConfidenceCurve:
    """Turns a drafter's own confidence into a probability: sigmoid(a logit(confidence) + b), learnt while serving.

    Every outcome is one Newton step of the logistic likelihood, in which old outcomes fade.

    Args:
        memory: Guesses after which an old one counts a third.
        trust: What the drafter's word weighs at first, in guesses.
    """

    def __init__(self, memory: float = 2000.0, trust: float = 10.0) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._weights = np.array([1.0, 0.0])  # a drafter is believed until it is shown to be wrong
        self._information = trust * np.eye(2)

    def __call__(self, confidence: Floats) -> Floats:
        slope, offset = self._weights
        return 1 / (1 + np.exp(-(slope * _logit(confidence) + offset)))

    def observe(self, confidence: Floats, accepted: NDArray[np.bool_]) -> None:
        """Learns from guesses that were tried. confidence, accepted: [guesses]."""
        for x, won in zip(_logit(confidence).tolist(), accepted.tolist(), strict=True):
            features = np.array([x, 1.0])
            p = 1 / (1 + math.exp(-float(features @ self._weights)))
            self._information = self._keep * self._information + p * (1 - p) * np.outer(features, features)
            self._weights = self._weights + np.linalg.solve(self._information, features * (won - p))


def _logit(probability: Floats) -> Floats:
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-3, 1 - 1e-3)
    return np.log(p / (1 - p))


# ---- calibration ----------------------------------------------------------------------------------------------------


class Reliability:
    """Predicted acceptance against what happened, in bins of the prediction.

    Args:
        bins: How many, of equal width.
    """

    def __init__(self, bins: int = 10) -> None:
        self._count, self._predicted, self._accepted = np.zeros(bins), np.zeros(bins), np.zeros(bins)

    def observe(self, predicted: float, accepted: bool) -> None:
        place = min(int(predicted * len(self._count)), len(self._count) - 1)
        self._count[place] += 1
        self._predicted[place] += predicted
        self._accepted[place] += accepted

    @property
    def curve(self) -> list[Mapping[str, float]]:
        """Per bin that holds anything: mean prediction, share accepted, number of guesses."""
        return [
            {"predicted": predicted / count, "accepted": accepted / count, "guesses": count}
            for count, predicted, accepted in zip(
                self._count.tolist(), self._predicted.tolist(), self._accepted.tolist(), strict=True
            )
            if count
        ]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of a guess's bin from the diagonal."""
        total = self._count.sum()
        return float(np.abs(self._predicted - self._accepted).sum() / total) if total else 0.0


def accepted_over_drafted(tree: Tree, accepted: Sequence[int]) -> tuple[int, int]:
    """The estimator that is common and biased, for comparison: accepted guesses, and all of them."""
    return len(accepted), len(tree)
