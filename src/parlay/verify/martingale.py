"""Whether sampled tokens follow the distributions that they should follow, and whether each was drawn afresh.

Every statistic is a sum over tokens of *indicator minus probability*: whether the token lies in a set that was chosen
before it was drawn, minus how likely that was by the reference given the very prefix that the server had sampled. Under
a lossless server each term has mean zero whatever came before, so the sum is a martingale, and its variance adds up
from known probabilities. It stays one where the set depends on earlier tokens, which is how randomness that was used
twice shows: conditioned on what came before, tokens are then likelier than they should be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from parlay.policy.trees import Floats, Ints

WIDE = 20  # tokens by likelihood, beyond which all others count as one
LAGS = 4  # tokens back whose luck is compared with a token's own
POWER = 0.9
LINES = 8 + LAGS  # statistics that there can be


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The likeliest next tokens by the reference.

    Attributes:
        ids: [k] by falling probability.
        chances: [k] their probabilities; what is missing to 1 belongs to all other tokens.
    """

    ids: Ints
    chances: Floats

    def chance(self, token: int) -> float | None:
        """Of one token; None where it is not among them."""
        found = np.flatnonzero(self.ids == token)
        return float(self.chances[found[0]]) if len(found) else None

    def quantile(self, token: int, chance: float) -> float:
        """A uniform number, if the token was drawn from this: where it lies if all are lined up by likelihood.

        Args:
            token: What was drawn.
            chance: A uniform number that says where within the token.
        """
        found = np.flatnonzero(self.ids == token)
        before = self.chances[: found[0]].sum() if len(found) else self.chances.sum()
        width = self.chances[found[0]] if len(found) else max(0.0, 1.0 - self.chances.sum())
        return float(np.clip(before + chance * width, 0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer.

    Attributes:
        prompt: The number of its prompt.
        tokens: What was sampled.
        scores: The reference's distribution of each, given the tokens before it.
    """

    prompt: int
    tokens: tuple[int, ...]
    scores: tuple[Scores, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """What one token adds to one statistic."""

    name: str
    difference: float
    variance: float
    most: float  # of the difference


@dataclass(slots=True)
class _Sum:
    """Of all terms of one name."""

    count: int = 0
    difference: float = 0.0
    variance: float = 0.0
    most: float = 0.0

    def add(self, term: Term) -> None:
        self.count += 1
        self.difference += term.difference
        self.variance += term.variance
        self.most = max(self.most, term.most)

    def limit(self, alpha: float) -> float:
        """What the sum's absolute value passes with a probability of at most alpha.

        Freedman's inequality for martingales (1975): 2 exp(-s^2 / (2 (V + b s / 3))), solved for s. Unlike a normal
        distribution's quantile it holds for rare events, too.
        """
        bits = math.log(2 / alpha)
        third = self.most * bits / 3
        return third + math.sqrt(third**2 + 2 * self.variance * bits)


@dataclass(frozen=True, slots=True)
class Statistic:
    """One sum.

    Attributes:
        name: What was counted.
        count: Tokens that it is over.
        shift: By how much it is off per token: a probability, or for `luck` a correlation.
        z: The sum in standard deviations.
        limit: |z| from which on the server fails.
        detectable: The shift that is found 9 times out of 10.
    """

    name: str
    count: int
    shift: float
    z: float
    limit: float
    detectable: float

    @property
    def passes(self) -> bool:
        return abs(self.z) < self.limit


def statistics(samples: Sequence[Sample], alpha: float, seed: int = 0) -> tuple[Statistic, ...]:
    """All statistics of these samples, in the order in which they were drawn.

    Args:
        samples: Answers.
        alpha: How often a lossless server fails any of the statistics, at most; shared equally between them.
        seed: Of where tokens lie within their probabilities.
    """
    sums: defaultdict[str, _Sum] = defaultdict(_Sum)
    rng = np.random.default_rng(seed)
    earlier: dict[int, tuple[tuple[int, ...], Floats]] = {}  # by prompt: the answer before, and its luck
    for sample in samples:
        chances = rng.random(len(sample.tokens))
        pairs = zip(sample.scores, sample.tokens, chances, strict=True)
        luck = np.array([scores.quantile(token, chance) - 0.5 for scores, token, chance in pairs])
        for term in _terms(sample, luck, *earlier.get(sample.prompt, ((), np.zeros(0)))):
            sums[term.name].add(term)
        earlier[sample.prompt] = sample.tokens, luck
    found = []
    for name, some in sums.items():
        deviation, limit = math.sqrt(max(some.variance, 1e-12)), some.limit(alpha / LINES)
        reach = limit + NormalDist().inv_cdf(POWER) * deviation
        z = some.difference / deviation
        found.append(
            Statistic(name, some.count, some.difference / some.count, z, limit / deviation, reach / some.count)
        )
    return tuple(found)


def _terms(sample: Sample, luck: Floats, before: Sequence[int], luck_before: Floats) -> Iterator[Term]:
    """What each token adds. luck: [tokens] quantile - 0.5; before: the answer before to this prompt."""
    for place, (scores, token) in enumerate(zip(sample.scores, sample.tokens, strict=True)):
        best = int(scores.ids[0])
        yield _indicator("the likeliest token", token == best, float(scores.chances[0]))
        if place:
            was_best = sample.tokens[place - 1] == sample.scores[place - 1].ids[0]
            name = "likeliest, after a likeliest" if was_best else "likeliest, after another"
            yield _indicator(name, token == best, float(scores.chances[0]))
        yield _indicator("the next three", token in scores.ids[1:4], float(scores.chances[1:4].sum()))
        rest = 1.0 - float(scores.chances[:WIDE].sum())
        yield _indicator("none of the likeliest", token not in scores.ids[:WIDE], rest)
        seen = np.isin(scores.ids, sample.tokens[:place])
        yield _indicator("a token that came before", token in scores.ids[seen], float(scores.chances[seen].sum()))
        if place < len(before) and (chance := scores.chance(before[place])) is not None:
            yield _indicator("as in the answer before", token == before[place], chance)
        if place < len(luck_before):
            yield _product("luck of the answer before", luck[place], luck_before[place])
        for lag in range(1, min(LAGS, place) + 1):
            yield _product(f"luck {lag} back", luck[place], luck[place - lag])


def _indicator(name: str, happened: bool, chance: float) -> Term:
    chance = min(max(chance, 0.0), 1.0)
    return Term(name, happened - chance, chance * (1 - chance), 1.0)


def _product(name: str, luck: float, earlier: float) -> Term:
    """Their correlation: the earlier one is known, and luck is uniform from -1/2 to 1/2, with a variance of 1/12."""
    return Term(name, 12 * luck * earlier, 12 * earlier**2, 3.0)
