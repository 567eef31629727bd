"""The three tests of a server: greedy answers, seeds, and sampled tokens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from parlay.bench.report import Advance
from parlay.verify.endpoint import Answer, Endpoint, EndpointError
from parlay.verify.martingale import Sample, Scores, Statistic, statistics
from parlay.verify.reference import Reference

Prompts = Sequence[tuple[int, ...]]
UNLIKELY = 1e-3


@dataclass(frozen=True, slots=True)
class Difference:
    """A greedy token that is not the reference's.

    Attributes:
        prompt: The number of its prompt.
        place: The number of the token in its answer.
        got: The server's token.
        wanted: The reference's likeliest.
        margin: By how much that is likelier, in nats.
    """

    prompt: int
    place: int
    got: int
    wanted: int
    margin: float


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy answers, token by token, each given the server's own tokens before it."""

    tokens: int
    tie: float  # margin up to which two tokens may change places, as sums are rounded differently
    ties: tuple[Difference, ...]
    faults: tuple[Difference, ...]

    @property
    def passes(self) -> bool:
        return not self.faults


@dataclass(frozen=True, slots=True)
class Seeds:
    """Sampled answers with a seed, each asked for twice."""

    answers: int
    repeated: int  # the same again
    different: int  # kinds of answers to one prompt that as many seeds gave
    alike: float  # how likely they were to be all the same

    @property
    def passes(self) -> bool:
        """Low precision may round sums otherwise the second time, so one of four may differ."""
        return 4 * self.repeated >= 3 * self.answers and (self.different > 1 or self.alike > UNLIKELY)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Sampled answers without a seed, against the reference's distributions."""

    answers: int
    tokens: int
    temperature: float
    alpha: float
    statistics: tuple[Statistic, ...]

    @property
    def passes(self) -> bool:
        return all(statistic.passes for statistic in self.statistics)


async def check_greedy(
    endpoint: Endpoint, reference: Reference, prompts: Prompts, max_tokens: int, tie: float, advance: Advance
) -> Greedy:
    """Compares greedy answers with what the reference would have said after the same tokens."""

    async def one(number: int, prompt: tuple[int, ...]) -> tuple[int, list[Difference]]:
        answer = await endpoint.answer(prompt, max_tokens=max_tokens, temperature=0, **_endless(reference))
        tokens, scores = await _scored(reference, prompt, answer, 0.0)
        found = []
        for place, (token, some) in enumerate(zip(tokens, scores, strict=True)):
            if token != some.ids[0]:
                chance = some.chance(token)
                margin = float("inf") if chance is None else float(np.log(some.chances[0] / chance))
                found.append(Difference(number, place, token, int(some.ids[0]), margin))
        advance()
        return len(tokens), found

    parts = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    differences = [difference for _, some in parts for difference in some]
    return Greedy(
        sum(count for count, _ in parts),
        tie,
        tuple(some for some in differences if some.margin <= tie),
        tuple(some for some in differences if some.margin > tie),
    )


async def check_seeds(
    endpoint: Endpoint, reference: Reference, prompts: Prompts, max_tokens: int, temperature: float, advance: Advance
) -> Seeds:
    """Asks for the same seeds twice, and for several seeds of one prompt; one request at a time."""

    async def ask(prompt: tuple[int, ...], seed: int) -> Answer:
        fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return await endpoint.answer(prompt, **fields, **_endless(reference))

    repeated = 0
    for seed, prompt in enumerate(prompts, start=1):
        repeated += await ask(prompt, seed) == await ask(prompt, seed)
        advance()
    different = {(await ask(prompts[0], seed)).tokens for seed in range(1, len(prompts) + 1)}
    only, scores = await _scored(reference, prompts[0], Answer(min(different), False), temperature)
    chance = math.prod(some.chance(token) or 0.0 for some, token in zip(scores, only, strict=True))
    return Seeds(len(prompts), repeated, len(different), chance ** (len(prompts) - 1))


async def check_samples(
    endpoint: Endpoint,
    reference: Reference,
    prompts: Prompts,
    answers: int,
    max_tokens: int,
    temperature: float,
    alpha: float,
    advance: Advance,
) -> Sampled:
    """Samples answers, several at a time, and holds every token of each against the reference."""

    async def one(number: int) -> Sample:
        prompt = prompts[number]
        answer = await endpoint.answer(prompt, max_tokens=max_tokens, temperature=temperature, **_endless(reference))
        tokens, scores = await _scored(reference, prompt, answer, temperature)
        advance()
        return Sample(number, tokens, tuple(scores))

    samples = await asyncio.gather(*(one(number) for number in islice(cycle(range(len(prompts))), answers)))
    found = statistics(samples, alpha)
    if not found:
        raise EndpointError("all answers are empty: nothing can be compared; give other prompts")
    return Sampled(answers, sum(len(sample.tokens) for sample in samples), temperature, alpha, found)


def _endless(reference: Reference) -> dict[str, bool]:
    """Answers must go on where nobody knows which tokens end them."""
    return {} if reference.ends else {"ignore_eos": True}


async def _scored(
    reference: Reference, prompt: tuple[int, ...], answer: Answer, temperature: float
) -> tuple[tuple[int, ...], list[Scores]]:
    """An answer's tokens with the distribution of each; the one that ended it is among them, returned or not."""
    scores, tokens = await reference.score(prompt, answer.tokens, temperature), answer.tokens
    if answer.stopped and reference.ends:
        if tokens and tokens[-1] in reference.ends:
            tokens = tokens[:-1]
        tokens = (*tokens, reference.ends[0])
    return tokens, scores[: len(tokens)]
