"""Load on a Parlay server for the demo: greedy chat requests that all must succeed, so many at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from parlay.bench import serving
from parlay.bench.client import Target, Wish
from parlay.bench.local_server import ServerFailed
from parlay.bench.serving import Planned
from parlay.bench.summary import RequestResult, request_results
from parlay.bench.workloads import Prompt
from parlay.types import Speculation


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
    methods: Mapping[str, int]  # steps by whose guesses they had

    @classmethod
    def of(cls, result: RequestResult) -> Self:
        """The reply to a request.

        Raises:
            ServerFailed: when it failed, or does not say what speculation did.
        """
        if result.failure is not None:
            raise ServerFailed(f"a request failed: {result.failure.kind}: {result.failure.message}")
        spent = result.speculation
        if spent is None:
            raise ServerFailed("a request failed: the server does not report usage.speculation")
        return cls(
            category=result.category,
            text=result.text,
            ttft=result.ttft if result.ttft is not None else result.e2e,
            seconds=result.e2e,
            tokens=result.output_tokens,
            steps=spent.steps,
            drafted=spent.drafted,
            accepted=spent.accepted,
            methods=result.methods,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """Requests with a fixed number in flight, from the first start to the last end; replies in order of the prompts."""

    concurrency: int
    speculation: Speculation
    seconds: float
    replies: tuple[Reply, ...]


def send(
    target: Target,
    prompts: Sequence[Prompt],
    speculation: Speculation,
    max_tokens: int,
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> Load:
    """Sends every prompt greedily, starting one whenever fewer than `concurrency` are in flight.

    Args:
        target: Where to.
        prompts: User messages.
        speculation: Asked for per request.
        max_tokens: Output limit of a request.
        concurrency: Requests in flight.
        done: Called after each reply.

    Raises:
        ServerFailed: when a request fails.
        KeyboardInterrupt: when the user interrupts.
    """
    plan = [Planned(prompt) for prompt in prompts]
    traffic = serving.send(target, Wish(max_tokens, speculation=speculation), plan, concurrency, done)
    if traffic.unfinished:
        raise KeyboardInterrupt
    results = request_results(traffic)
    replies = tuple(map(Reply.of, results))
    return Load(concurrency, speculation, max(result.sent + result.e2e for result in results), replies)
