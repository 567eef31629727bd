"""What the server counts for Prometheus, under the names that vLLM's users know with `parlay:` in front.

The mean acceptance length, that is the tokens which a verified draft yields, the one after its guesses included:

    1 + sum by (method) (rate(parlay:spec_decode_num_accepted_tokens_total[5m]))
      / sum by (method) (rate(parlay:spec_decode_num_drafts_total[5m]))

The share of drafts whose guess at each position was accepted:

    sum by (method, position) (rate(parlay:spec_decode_num_accepted_tokens_per_pos_total[5m]))
      / on (method) group_left sum by (method) (rate(parlay:spec_decode_num_drafts_total[5m]))

Counts and times are per choice: a request for n choices counts n times, as it does in vLLM, but its prompt once.
Everything here runs on the event loop. Counters are plain numbers that become metrics when somebody asks for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from parlay.types import Delta, EngineStatus, FinishReason, Request

_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
_WIDE = (*_FINE, 25, 50, 100, 250, 500, 1000, 2500)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


@dataclass(slots=True)
class _Bets:
    """What came of one method's drafts."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: Counter[int] = field(default_factory=Counter)  # accepted guesses by their depth, from 0

    def add(self, delta: Delta) -> None:
        self.drafts += 1
        self.drafted += delta.stats.drafted
        self.accepted += delta.stats.accepted
        self.by_position.update(range(delta.stats.accepted))


@dataclass(slots=True)
class _Tally:
    """The server's own counters since its start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # choices by reason
    aborted: int = 0
    failed: int = 0
    refused: int = 0
    bets: dict[str, _Bets] = field(default_factory=dict)  # by method


class Metrics:
    """The metrics of one application, in a registry of their own.

    Args:
        model: The value of the label `model_name`.
        status: How the engine stands, as of its last step.
    """

    def __init__(self, model: str, status: Callable[[], EngineStatus]) -> None:
        self.tally = _Tally()
        self._registry = CollectorRegistry()
        self._registry.register(_Counters(model, status, self.tally))

        def histogram(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(f"parlay:{name}", about, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a call's arrival to a choice's first token.", _WIDE
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two steps that gave a choice tokens, however many.", _FINE
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a finished choice's tokens after its first ones.",
            _FINE,
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "From a call's arrival to the end of a choice.", _WIDE
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "From the end of tokenisation to a choice's first step.", _WIDE
        )
        self.prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of finished choices.", _TOKENS)
        self.output_sizes = histogram("request_generation_tokens", "Output tokens of finished choices.", _TOKENS)

    def watch(self, requests: Sequence[Request], arrived: float) -> CallWatch:
        """Watches the requests of one call, which arrived at this time on `time.perf_counter`'s clock."""
        return CallWatch(self, requests, arrived)

    def refuse(self, choices: int) -> None:
        """Notes a call of so many choices that found the queue full."""
        self.tally.refused += choices

    def fail(self, choices: int) -> None:
        """Notes a call of so many choices that the engine failed to take."""
        self.tally.failed += choices

    def write(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the text format that an Accept header asks for, and its content type."""
        try:
            encode, content_type = choose_encoder(accept)
            return encode(self._registry), content_type
        except TypeError:  # what prometheus_client makes of a version that is not made of numbers
            encode, content_type = choose_encoder("")
            return encode(self._registry), content_type


@dataclass(slots=True)
class _Progress:
    """A choice that has not ended."""

    num_prompt_tokens: int
    num_tokens: int = 0
    num_first_tokens: int = 0  # how many came at once at first: nobody waited for one of them alone
    first: float = 0.0  # when its first tokens came, and its last so far, on time.perf_counter's clock
    last: float = 0.0


class CallWatch:
    """Notes what arrives for one call; a `parlay.server.worker.Watcher`."""

    def __init__(self, metrics: Metrics, requests: Sequence[Request], arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._live = {
            (request.id, choice): _Progress(len(request.prompt))
            for request in requests
            for choice in range(request.params.n)
        }

    def arrive(self, deltas: Sequence[Delta]) -> None:
        now = time.perf_counter()
        tally = self._metrics.tally
        for delta in deltas:
            key = delta.request_id, delta.choice
            progress = self._live.get(key)
            if progress is None or not delta.tokens:  # a chunk of a scored prompt has no tokens
                continue
            if delta.stats.drafted and delta.method is not None:
                tally.bets.setdefault(delta.method, _Bets()).add(delta)
            tally.generation_tokens += len(delta.tokens)
            self._time(progress, delta, now)
            if delta.finish_reason is not None:
                del self._live[key]
                self._finish(progress, delta.finish_reason)

    def end(self, failed: bool) -> None:
        """Counts what has not finished; a second end counts nothing."""
        if failed:
            self._metrics.tally.failed += len(self._live)
        else:
            self._metrics.tally.aborted += len(self._live)
        self._live.clear()

    def _time(self, progress: _Progress, delta: Delta, now: float) -> None:
        metrics = self._metrics
        if progress.num_tokens:
            metrics.inter_token_latency.observe(now - progress.last)
        else:
            progress.first = now
            progress.num_first_tokens = len(delta.tokens)
            metrics.time_to_first_token.observe(now - self._arrived)
            metrics.queue_time.observe(delta.queued)
            if delta.choice == 0:  # the others share its prompt
                metrics.tally.prompt_tokens += progress.num_prompt_tokens
        progress.num_tokens += len(delta.tokens)
        progress.last = now

    def _finish(self, progress: _Progress, reason: FinishReason) -> None:
        metrics = self._metrics
        metrics.tally.finished[reason] += 1
        metrics.e2e_latency.observe(progress.last - self._arrived)
        metrics.prompt_sizes.observe(progress.num_prompt_tokens)
        metrics.output_sizes.observe(progress.num_tokens)
        if later := progress.num_tokens - progress.num_first_tokens:
            metrics.time_per_output_token.observe((progress.last - progress.first) / later)


class _Counters(Collector):
    """Gauges and counters, made from plain numbers when they are asked for."""

    def __init__(self, model: str, status: Callable[[], EngineStatus], tally: _Tally) -> None:
        self._model = model
        self._status = status
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        status, tally = self._status(), self._tally
        yield self._gauge("num_requests_running", "Choices that run.", status.running)
        yield self._gauge("num_requests_waiting", "Choices that wait to run.", status.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", status.kv_usage)
        yield self._counter("num_preemptions", "Choices that lost their KV pages to others.", status.preemptions)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", status.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", status.prefix_hits)
        yield self._counter("prompt_tokens", "Prompt tokens processed.", tally.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", tally.generation_tokens)
        yield self._counter("request_aborted", "Choices whose client left before their end.", tally.aborted)
        yield self._counter("request_failed", "Choices that the engine failed to finish.", tally.failed)
        yield self._counter("request_refused", "Choices refused because the queue was full.", tally.refused)
        yield self._family(
            "request_success",
            "Choices that finished, by what ended them.",
            ("finished_reason",),
            {(reason,): tally.finished[reason] for reason in get_args(FinishReason)},
        )
        yield self._family(
            "spec_decode_drafter_failures",
            "Drafters that raised an error and were switched off.",
            ("method",),
            dict.fromkeys(((method,) for method in status.failed_drafters), 1),
        )
        yield from self._speculation()

    def _speculation(self) -> Iterator[Metric]:
        bets = self._tally.bets
        for name, about, values in (
            ("num_drafts", "Drafts verified.", {(method,): each.drafts for method, each in bets.items()}),
            ("num_draft_tokens", "Guesses verified.", {(method,): each.drafted for method, each in bets.items()}),
            ("num_accepted_tokens", "Guesses accepted.", {(method,): each.accepted for method, each in bets.items()}),
        ):
            yield self._family(f"spec_decode_{name}", about, ("method",), values)
        yield self._family(
            "spec_decode_num_accepted_tokens_per_pos",
            "Guesses accepted by their position in the draft, from 0.",
            ("method", "position"),
            {(name, str(at)): count for name, each in bets.items() for at, count in sorted(each.by_position.items())},
        )

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"parlay:{name}", about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, about: str, value: int) -> Metric:
        return self._family(name, about, (), {(): value})

    def _family(self, name: str, about: str, labels: Sequence[str], values: dict[tuple[str, ...], int]) -> Metric:
        family = CounterMetricFamily(f"parlay:{name}", about, labels=["model_name", *labels])
        for own, value in values.items():
            family.add_metric([self._model, *own], value)
        return family
