"""Drives an engine without a server, with a fixed number of requests in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parlay.engine.engine import Engine
from parlay.types import Request, SamplingParams, SpeculationStats


@dataclass(frozen=True, slots=True)
class Output:
    """What one request got."""

    tokens: tuple[int, ...]
    stats: SpeculationStats


@dataclass(frozen=True, slots=True)
class Run:
    """All outputs of one run, in the order of the prompts."""

    outputs: tuple[Output, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def drive(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> Run:
    """Answers all prompts, starting one whenever fewer than `concurrency` are in flight.

    Args:
        engine: An idle engine.
        prompts: Token ids.
        params: For all of them; n must be 1.
        concurrency: Requests in flight.
        done: Called after each request.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    stats = [SpeculationStats() for _ in prompts]
    started = finished = 0
    began = time.perf_counter()
    while finished < len(prompts):
        while started < len(prompts) and started - finished < concurrency:
            engine.add(Request(str(started), prompts[started], params, time.perf_counter()))
            started += 1
        for delta in engine.step():
            index = int(delta.request_id)
            tokens[index] += delta.tokens
            stats[index] += delta.stats
            if delta.finish_reason is not None:
                finished += 1
                done()
    seconds = time.perf_counter() - began
    return Run(tuple(Output(tuple(t), s) for t, s in zip(tokens, stats, strict=True)), seconds)
