"""From replies to numbers: what each request took, and what the run delivered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from parlay.bench.client import Failure
from parlay.bench.objectives import meets
from parlay.bench.serving import Outcome, Traffic
from parlay.types import SpeculationStats

Counted = Literal["usage", "chunks", "usage and chunks"]


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request. Times are in seconds; `due` and `sent` since the start of the run, the others since it was sent.

    Attributes:
        category: The prompt's.
        due: When the schedule had it.
        sent: When it was sent.
        ttft: Until the first text; None where none came.
        tpot: Per token after the first; None for an output of one chunk or token.
        e2e: Until the end of the answer, or its failure.
        chunks: When each piece of text arrived.
        input_tokens: As the server counts; None when it does not say.
        output_tokens: As the server counts, else the number of pieces of text.
        counted: Which of the two.
        speculation: Steps, drafted and accepted tokens; None when the server does not say.
        methods: Steps by whose guesses they had.
        finish_reason: As the server says.
        failure: None for a complete answer.
        text: The output.
    """

    category: str
    due: float
    sent: float
    ttft: float | None
    tpot: float | None
    e2e: float
    chunks: tuple[float, ...]
    input_tokens: int | None
    output_tokens: int
    counted: Literal["usage", "chunks"]
    speculation: SpeculationStats | None
    methods: Mapping[str, int]
    finish_reason: str | None
    failure: Failure | None
    text: str

    @property
    def lag(self) -> float:
        return self.sent - self.due


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of so many values, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """Of the values that exist; None when there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        p50, p90, p99 = (float(each) for each in np.percentile(known, (50, 90, 99)))
        return cls(len(known), float(np.mean(known)), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Betting:
    """What speculation did in the requests whose usage tells.

    Attributes:
        requests: How many those are.
        stats: Totals.
        tokens_per_step: Output tokens over steps; None without steps.
        acceptance: Accepted over drafted tokens; None when nothing was drafted.
    """

    requests: int
    stats: SpeculationStats
    tokens_per_step: float | None
    acceptance: float | None


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Failures of one kind, and what the first of them said."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run delivered. Only complete answers count, except where it says otherwise.

    Rates are over `seconds`, failed requests included in that time.

    Attributes:
        completed: Complete answers.
        failed: Answers that failed.
        unfinished: Requests that were not answered when the run was interrupted.
        seconds: From the first request sent to the end of the last one, failed or not.
        peak_concurrency: Most requests in flight, those that failed included.
        requests_per_second: Throughput.
        input_tokens: Total; None when the server does not say for all.
        output_tokens: Total.
        counted: Where the output tokens are from.
        input_tokens_per_second: Throughput.
        output_tokens_per_second: Throughput.
        ttft: From sending to the first text.
        tpot: Time per output token after the first.
        itl: Gaps between pieces of text.
        e2e: From sending to the end of the answer.
        lag: How much later than scheduled all requests were sent, failed or not; None without a schedule.
        goodput: Requests per second that met the objectives; None without objectives.
        speculation: None when the server does not tell.
        errors: Of the failed requests, most frequent first.
    """

    completed: int
    failed: int
    unfinished: int
    seconds: float
    peak_concurrency: int
    requests_per_second: float
    input_tokens: int | None
    output_tokens: int
    counted: Counted
    input_tokens_per_second: float | None
    output_tokens_per_second: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    lag: Distribution | None
    goodput: float | None
    speculation: Betting | None
    errors: tuple[ErrorCount, ...]


def request_results(traffic: Traffic) -> list[RequestResult]:
    """Every outcome, with times counted from the start of the run."""
    return [_result(outcome, traffic.began) for outcome in traffic.outcomes]


def _result(outcome: Outcome, began: float) -> RequestResult:
    reply = outcome.reply
    chunks = tuple(arrived - reply.sent for arrived in reply.chunks)
    said = reply.usage.completion_tokens if reply.usage else None
    tokens = said if said is not None else len(chunks)
    return RequestResult(
        category=outcome.prompt.category,
        due=outcome.due - began,
        sent=reply.sent - began,
        ttft=chunks[0] if chunks else None,
        tpot=(chunks[-1] - chunks[0]) / (tokens - 1) if tokens > 1 and len(chunks) > 1 else None,
        e2e=reply.ended - reply.sent,
        chunks=chunks,
        input_tokens=reply.usage.prompt_tokens if reply.usage else None,
        output_tokens=tokens,
        counted="chunks" if said is None else "usage",
        speculation=reply.usage.speculation if reply.usage else None,
        methods=reply.usage.methods if reply.usage else {},
        finish_reason=reply.finish_reason,
        failure=reply.failure,
        text=reply.text,
    )


def summarise(
    results: Sequence[RequestResult], unfinished: int, scheduled: bool, objectives: Mapping[str, float]
) -> Summary:
    """Totals and distributions.

    Args:
        results: Every request that was answered or failed.
        unfinished: How many more there should have been.
        scheduled: Whether requests were due at a time.
        objectives: Limits in seconds by metric, for the goodput.
    """
    good = [result for result in results if result.failure is None]
    seconds = max((r.sent + r.e2e for r in results), default=0.0) - min((r.sent for r in results), default=0.0)
    inputs = [result.input_tokens for result in good]
    known = [tokens for tokens in inputs if tokens is not None]
    input_tokens = sum(known) if known and len(known) == len(inputs) else None
    output_tokens = sum(result.output_tokens for result in good)

    def rate(amount: float) -> float:
        return amount / seconds if seconds else 0.0

    def spread(measure: Callable[[RequestResult], float | None]) -> Distribution | None:
        return Distribution.of(map(measure, good))

    met = sum(meets({"ttft": r.ttft, "tpot": r.tpot, "e2e": r.e2e}, objectives) for r in good)
    return Summary(
        completed=len(good),
        failed=len(results) - len(good),
        unfinished=unfinished,
        seconds=seconds,
        peak_concurrency=peak(results),
        requests_per_second=rate(len(good)),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        counted=_counted(good),
        input_tokens_per_second=rate(input_tokens) if input_tokens is not None else None,
        output_tokens_per_second=rate(output_tokens),
        ttft=spread(lambda result: result.ttft),
        tpot=spread(lambda result: result.tpot),
        itl=Distribution.of(later - earlier for result in good for earlier, later in pairwise(result.chunks)),
        e2e=spread(lambda result: result.e2e),
        lag=Distribution.of(result.lag for result in results) if scheduled else None,
        goodput=rate(met) if objectives else None,
        speculation=_betting(good),
        errors=_errors(results),
    )


def peak(results: Iterable[RequestResult]) -> int:
    """Most requests in flight; one that ends when another is sent makes room for it."""
    changes = sorted(change for r in results for change in ((r.sent, 1), (r.sent + r.e2e, -1)))
    flying = most = 0
    for _, change in changes:
        flying += change
        most = max(most, flying)
    return most


def _counted(results: Iterable[RequestResult]) -> Counted:
    kinds = {result.counted for result in results}
    if kinds == {"usage", "chunks"}:
        return "usage and chunks"
    return "chunks" if kinds == {"chunks"} else "usage"


def _betting(results: Iterable[RequestResult]) -> Betting | None:
    told = [(result.output_tokens, result.speculation) for result in results if result.speculation is not None]
    if not told:
        return None
    total = sum((stats for _, stats in told), SpeculationStats())
    tokens = sum(tokens for tokens, _ in told)
    return Betting(
        requests=len(told),
        stats=total,
        tokens_per_step=tokens / total.steps if total.steps else None,
        acceptance=total.accepted / total.drafted if total.drafted else None,
    )


def _errors(results: Iterable[RequestResult]) -> tuple[ErrorCount, ...]:
    messages: dict[str, list[str]] = {}
    for result in results:
        if result.failure is not None:
            messages.setdefault(result.failure.kind, []).append(result.failure.message)
    counts = [ErrorCount(kind, len(said), said[0]) for kind, said in messages.items()]
    return tuple(sorted(counts, key=lambda error: -error.count))
