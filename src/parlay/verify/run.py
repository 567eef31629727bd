"""`parlay verify`: asks, compares, prints; exits with 1 where a server is not lossless."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from parlay.bench import environment
from parlay.bench.report import console, progress, table
from parlay.bench.workloads import load_prompts
from parlay.verify.checks import Difference, Greedy, Sampled, Seeds, check_greedy, check_samples, check_seeds
from parlay.verify.endpoint import Endpoint, EndpointError
from parlay.verify.martingale import POWER
from parlay.verify.reference import EndpointReference, ModelReference, Reference

SHOWN = 5  # differences


@dataclass(frozen=True, slots=True)
class Settings:
    """What to test, and how thoroughly; see the options of the command for each."""

    url: str
    model: str | None
    concurrency: int
    reference_url: str | None
    reference_model: str | None
    dtype: str
    dataset: Path | None
    prompts: int
    answers: int
    max_tokens: int
    temperature: float
    tie: float
    alpha: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """All results."""

    settings: Settings
    greedy: Greedy
    seeds: Seeds
    sampled: Sampled

    @property
    def passes(self) -> bool:
        return self.greedy.passes and self.seeds.passes and self.sampled.passes


def run(settings: Settings, api_key: str | None, reference_api_key: str | None, json_to: str | None) -> int:
    """Tests and prints; the exit status: 0 for a lossless server, 1 for another, 2 if it could not be found out.

    Raises:
        ValueError: naming the option that is wrong.
    """
    if settings.reference_url is not None and settings.reference_model is not None:
        raise ValueError("reference_url, reference_model: give one of them")
    if settings.reference_model is None and settings.temperature != 1:
        raise ValueError("temperature: must be 1 where a server is the reference; or give --reference-model")
    captured = environment.capture()
    try:
        found = asyncio.run(examine(settings, api_key, reference_api_key))
    except EndpointError as error:
        console(stderr=True).print(f"cannot be tested: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except (ValueError, OSError):  # what is wrong with an option, in a sentence of its own
        raise
    except Exception:  # 1 would say that the server is at fault
        console(stderr=True).print_exception()
        return 2
    if json_to is not None:
        environment.deliver(json_to, captured, found)
    if json_to != "-":
        show(found)
    return 0 if found.passes else 1


async def examine(settings: Settings, api_key: str | None, reference_api_key: str | None) -> Verdict:
    """All three tests, one after the other.

    Raises:
        EndpointError: when a server cannot be tested.
    """
    endpoint = Endpoint(settings.url, settings.model, api_key, settings.concurrency)
    other = None
    if settings.reference_url is not None:
        other = Endpoint(settings.reference_url, None, reference_api_key, settings.concurrency)
    try:
        for some in (endpoint, other):
            if some is not None:
                await some.open()
        reference: Reference = (
            EndpointReference(other or endpoint)
            if settings.reference_model is None
            else ModelReference(settings.reference_model, settings.dtype)
        )
        texts = [prompt.text for prompt in load_prompts(settings.dataset, settings.prompts)]
        prompts = [await reference.encode(text) for text in texts]
        length, heat = settings.max_tokens, settings.temperature
        with progress("greedy answers", len(prompts)) as advance:
            greedy = await check_greedy(endpoint, reference, prompts, 2 * length, settings.tie, advance)
        with progress("seeds", len(prompts)) as advance:
            seeds = await check_seeds(endpoint, reference, prompts, length, heat, advance)
        with progress("samples", settings.answers) as advance:
            sampled = await check_samples(
                endpoint, reference, prompts, settings.answers, length, heat, settings.alpha, advance
            )
        return Verdict(settings, greedy, seeds, sampled)
    finally:
        for some in (endpoint, other):
            if some is not None:
                await some.close()


def show(found: Verdict) -> None:
    """Prints what was found, test by test."""
    out, greedy, seeds, sampled = console(), found.greedy, found.seeds, found.sampled
    out.print(
        f"greedy: {_word(greedy.passes)}. {greedy.tokens} tokens, of which {len(greedy.ties)} are another than the "
        f"reference's by at most {greedy.tie:g} nats (near ties), and {len(greedy.faults)} by more",
        highlight=False,
    )
    for some in greedy.faults[:SHOWN]:
        out.print(f"  {_about(some)}", highlight=False)
    out.print(
        f"seeds: {_word(seeds.passes)}. {seeds.repeated} of {seeds.answers} answers are the same again with the same "
        f"seed; {seeds.answers} seeds give {seeds.different} different answers to one prompt",
        highlight=False,
    )
    rows = (
        (
            some.name,
            some.count,
            f"{some.shift:+.4f}",
            f"{some.z:+.1f}",
            f"{some.limit:.1f}",
            f"{some.detectable:.4f}",
            _word(some.passes),
        )
        for some in sampled.statistics
    )
    columns = ("indicator", "tokens", "off by", "z", "limit", f"found {POWER:.0%} of the time", "")
    title = (
        f"samples: {_word(sampled.passes)}. {sampled.tokens} tokens of {sampled.answers} answers at temperature "
        f"{sampled.temperature:g}; a lossless server fails {sampled.alpha:.1%} of the time, at most"
    )
    out.print(table(title, columns, rows))
    out.print("lossless, as far as this test sees" if found.passes else "NOT lossless", highlight=False)


def _about(some: Difference) -> str:
    where = f"prompt {some.prompt}, token {some.place}"
    return f"{where}: {some.got}, where {some.wanted} is likelier by {some.margin:.2f} nats"


def _word(passes: bool) -> str:
    return "passes" if passes else "FAILS"
