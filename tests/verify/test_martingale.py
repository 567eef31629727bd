"""Statistics of made-up servers: correct ones pass as often as is said, and each fault shows where it should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parlay.verify.martingale import Sample, Scores, Term, _Sum, statistics

TOKENS = 12  # of the vocabulary
Draw = Callable[[np.random.Generator, np.ndarray, list[int]], int]


def law(prompt: int, tokens: list[int]) -> np.ndarray:
    """A made-up model: the next token's distribution hangs on the last two."""
    rng = np.random.default_rng([prompt, *tokens[-2:]])
    return rng.dirichlet(np.full(TOKENS, 0.3))


def scores(chances: np.ndarray, known: int = TOKENS) -> Scores:
    order = np.argsort(-chances)[:known]
    return Scores(order, chances[order])


def answers(draw: Draw, count: int, seed: int, known: int = TOKENS) -> list[Sample]:
    found, rng = [], np.random.default_rng(seed)
    for number in range(count):
        tokens: list[int] = []
        seen = []
        for _ in range(16):
            chances = law(number % 4, tokens)
            seen.append(scores(chances, known))
            tokens.append(draw(rng, chances, tokens))
        found.append(Sample(number % 4, tuple(tokens), tuple(seen)))
    return found


def fresh(rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
    return int(rng.choice(TOKENS, p=chances))


@pytest.mark.parametrize("known", [TOKENS, 5])
def test_a_correct_server_fails_as_seldom_as_is_said(known: int) -> None:
    """Also where only the likeliest are known. At alpha 0.2 no more than 8 of 40 runs should."""
    runs = [statistics(answers(fresh, 60, seed, known), alpha=0.2, seed=seed) for seed in range(40)]
    failed = sum(not all(some.passes for some in run) for run in runs)
    assert failed <= 12
    by_name: dict[str, list[float]] = {}
    for run in runs:
        for some in run:
            by_name.setdefault(some.name, []).append(some.z)
    for name, values in by_name.items():
        assert abs(np.mean(values)) < 0.65, name  # 4 standard errors
        assert np.std(values) < 1.5, name
        assert np.std(values) > 0.5 or (known, name) == (TOKENS, "none of the likeliest"), name  # that never happens


def test_limits_hold_for_rare_events() -> None:
    """Tokens that come once in a thousand: no more sums of 1000 terms pass their limit than alpha says."""
    rng, alpha = np.random.default_rng(0), 0.02
    some = _Sum()
    for _ in range(1000):
        some.add(Term("rare", 0.0, 0.001 * 0.999, 1.0))
    limit = some.limit(alpha)
    counts = rng.binomial(1000, 0.001, size=20_000)
    assert (np.abs(counts - 1) >= limit).mean() <= alpha
    assert limit < 6  # and it is no idle one


def greedy(rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
    return int(chances.argmax())


def without_residual(rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
    """A guess by the rule for one guess, but what follows a rejection is drawn as if there had been none."""
    guess = int(chances.argmax())
    return guess if rng.random() < chances[guess] else fresh(rng, chances, tokens)


def cut_off(rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
    """As with a drafter that cannot say rare tokens, if its limits became the server's."""
    some = np.where(chances >= np.sort(chances)[-5], chances, 0)
    return fresh(rng, some / some.sum(), tokens)


class Again:
    """Gumbel noise by token that is drawn once per answer: tokens of one answer are no independent draws."""

    def __init__(self) -> None:
        self._noise = np.zeros(TOKENS)

    def __call__(self, rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
        if not tokens:
            self._noise = rng.gumbel(size=TOKENS)
        return int((np.log(chances + 1e-300) + self._noise).argmax())


class OneNumber:
    """One uniform number per answer decides all of its tokens."""

    def __init__(self) -> None:
        self._number = 0.5

    def __call__(self, rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
        if not tokens:
            self._number = rng.random()
        order = np.argsort(-chances)
        place = np.searchsorted(np.cumsum(chances[order]), self._number)
        return int(order[min(place, TOKENS - 1)])


class SameAnswers:
    """The same noise for every request, by place and token: each token alone is drawn right."""

    def __call__(self, rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
        noise = np.random.default_rng(len(tokens)).gumbel(size=TOKENS)
        return int((np.log(chances + 1e-300) + noise).argmax())


@pytest.mark.parametrize(
    ("draw", "telling"),
    [
        (greedy, "the likeliest token"),
        (without_residual, "the likeliest token"),
        (cut_off, "none of the likeliest"),
        (Again(), "a token that came before"),
        (OneNumber(), "luck 1 back"),
        (SameAnswers(), "luck of the answer before"),
    ],
)
def test_each_fault_shows(draw: Draw, telling: str) -> None:
    known = 5 if draw is cut_off else TOKENS
    found = {some.name: some for some in statistics(answers(draw, 150, 1, known), alpha=1e-4)}
    assert not found[telling].passes


def test_what_can_be_detected_is_said() -> None:
    """A shift of just that size is found 9 times out of 10."""
    base = {some.name: some for some in statistics(answers(fresh, 100, 0), alpha=0.01)}["the likeliest token"]

    def shifted(rng: np.random.Generator, chances: np.ndarray, tokens: list[int]) -> int:
        best, others = int(chances.argmax()), chances.copy()
        gain = min(base.detectable, 1 - chances[best])
        others[best] = 0
        moved = others * (1 - gain / max(others.sum(), 1e-12))
        moved[best] = chances[best] + gain
        return fresh(rng, moved / moved.sum(), tokens)

    runs = [statistics(answers(shifted, 100, seed), alpha=0.01, seed=seed) for seed in range(30)]
    caught = sum(not some.passes for run in runs for some in run if some.name == "the likeliest token")
    assert 20 <= caught <= 30
