"""Load on a server as users make it: streaming chat requests of the OpenAI client, so many at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parlay.bench.workloads import Prompt
from parlay.types import Speculation

if TYPE_CHECKING:
    import openai


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request, timed by the client."""

    category: str
    text: str
    ttft: float  # seconds until the first text
    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Load:
    """Requests with a fixed number in flight, from the first start to the last end; replies in order of the prompts."""

    concurrency: int
    speculation: Speculation
    seconds: float
    replies: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, which model, how much to ask for."""

    url: str
    model: str
    max_tokens: int


def send(
    target: Target, prompts: Sequence[Prompt], speculation: Speculation, concurrency: int, done: Callable[[], None]
) -> Load:
    """Sends every prompt greedily, starting one whenever fewer than `concurrency` are in flight.

    Args:
        target: Where to.
        prompts: User messages.
        speculation: Asked for per request.
        concurrency: Requests in flight.
        done: Called after each reply.
    """
    return asyncio.run(_send(target, prompts, speculation, concurrency, done))


async def _send(
    target: Target, prompts: Sequence[Prompt], speculation: Speculation, concurrency: int, done: Callable[[], None]
) -> Load:
    import openai

    gate = asyncio.Semaphore(concurrency)

    async def ask(prompt: Prompt) -> Reply:
        async with gate:
            reply = await _ask(client, target, prompt, speculation)
        done()
        return reply

    direct = openai.DefaultAsyncHttpxClient(
        trust_env=False, timeout=600
    )  # the server is near: no proxy from the environment
    async with openai.AsyncOpenAI(
        base_url=f"{target.url}/v1", api_key="none", max_retries=0, http_client=direct
    ) as client:
        began = time.perf_counter()
        replies = await asyncio.gather(*map(ask, prompts))
        seconds = time.perf_counter() - began
    return Load(concurrency, speculation, seconds, tuple(replies))


async def _ask(client: openai.AsyncOpenAI, target: Target, prompt: Prompt, speculation: Speculation) -> Reply:
    began = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    usage: Any = None
    stream = await client.chat.completions.create(
        model=target.model,
        messages=[{"role": "user", "content": prompt.text}],
        temperature=0,
        max_tokens=target.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"speculation": speculation},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter() - began
            pieces.append(piece)
    seconds = time.perf_counter() - began
    spent = usage.model_extra["speculation"]
    return Reply(
        category=prompt.category,
        text="".join(pieces),
        ttft=first if first is not None else seconds,
        seconds=seconds,
        tokens=usage.completion_tokens,
        **{name: spent[name] for name in ("steps", "drafted", "accepted")},
    )
