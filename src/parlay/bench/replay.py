"""What a deterministic drafter would have earned on an output that is known already.

A greedy output does not depend on what was guessed, so one plain run tells for every drafter setting which guesses
verification would have accepted. Nothing is computed but the guesses.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parlay.bench.offline import drive
from parlay.bench.report import Advance
from parlay.bench.workloads import Prompt, encode
from parlay.config import Dtype, EngineConfig
from parlay.engine.engine import Engine
from parlay.types import Offer, Request, Row, SamplingParams


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its greedy output."""

    category: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]


def generate(
    model: str, dtype: Dtype, prompts: Sequence[Prompt], max_tokens: int, concurrency: int, advance: Advance
) -> list[Text]:
    """The greedy outputs of a model, decoded without guesses."""
    engine = Engine(EngineConfig(model, dtype=dtype, speculation=None, compile="wait"))
    tokens = encode(prompts, engine.tokenizer)
    run = drive(engine, tokens, SamplingParams(temperature=0, max_tokens=max_tokens), concurrency, advance)
    return [
        Text(prompt.category, ids, output.tokens)
        for prompt, ids, output in zip(prompts, tokens, run.outputs, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Replayed:
    """Totals over one or more outputs."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Replayed) -> Replayed:
        return Replayed(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(1, self.steps)


class Guesser(Protocol):
    """What a replay asks of a drafter."""

    def offer(self, rows: Sequence[Row]) -> Sequence[Offer | None]:
        """See `Drafter`."""
        ...

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        ...


def replay(drafter: Guesser, prompt: Sequence[int], output: Sequence[int], max_tokens: int) -> Replayed:
    """Walks through a known output as verification would, betting the drafter's whole offer at every step.

    Args:
        drafter: A deterministic one, whose offers show their tokens.
        prompt: The prompt's tokens.
        output: What greedy decoding made of it.
        max_tokens: The request's limit, beyond which nothing is guessed.
    """
    request = Request("replay", tuple(prompt), SamplingParams(temperature=0, max_tokens=max_tokens))
    tokens = array("i", prompt)
    made, total = 0, Replayed()
    while made < len(output):
        row = Row(
            seq=0,
            request=request,
            choice=0,
            tokens=tokens,
            length=len(tokens),
            start=len(tokens) - 1,
            count=1,
            scored=0,
            max_depth=max_tokens - made - 1,
            pages=[],
        )
        offer = drafter.offer([row])[0] if row.max_depth > 0 else None
        accepted = _accepted(offer, output[made:]) if offer is not None else 0
        emitted = output[made : made + accepted + 1]
        total += Replayed(1, len(emitted), len(offer.tree) if offer else 0, accepted)
        tokens.extend(emitted)
        made += len(emitted)
    drafter.forget(0)
    return total


def _accepted(offer: Offer, following: Sequence[int]) -> int:
    """Length of the path of guesses that says what follows."""
    guesses = offer.tokens or ()
    children = offer.tree.children()
    node, depth = -1, 0
    for token in following:
        child = next((child for child in children.get(node, ()) if guesses[child] == token), None)
        if child is None:
            break
        node, depth = child, depth + 1
    return depth
