"""What /metrics says, counted against what was asked and answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from parlay.engine.engine import Engine
from parlay.server.metrics import Metrics
from parlay.types import Delta, EngineStatus, Request, SamplingParams
from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, serving, until

Sample = tuple[str, tuple[tuple[str, str], ...]]


def read(server: Server) -> dict[Sample, float]:
    """Every sample by its name without the prefix and its labels without the model's name."""
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


def samples(text: str) -> dict[Sample, float]:
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith("parlay:")
            labels = dict(sample.labels)
            assert labels.pop("model_name") == MODEL
            found[sample.name.removeprefix("parlay:"), tuple(sorted(labels.items()))] = sample.value
    return found


def value(found: dict[Sample, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@pytest.fixture
def parrot() -> StandIn:
    return StandIn(paced=True)


@pytest.fixture
def stand(parrot: StandIn) -> Iterator[Server]:
    with serving(parrot) as running:
        yield running


def pace(engine: StandIn, steps: int) -> None:
    assert engine.pace is not None
    engine.pace.release(steps)


def test_counts_of_a_call(parrot: StandIn, stand: Server) -> None:
    pace(parrot, 3)
    with stand.client() as client:
        began = time.perf_counter()
        client.completions.create(model=MODEL, prompt=["abcd", "xy"], n=2, max_tokens=3)
        elapsed = time.perf_counter() - began
    found = read(stand)
    assert value(found, "prompt_tokens_total") == 6
    assert value(found, "generation_tokens_total") == 12
    assert value(found, "request_success_total", finished_reason="length") == 4
    assert value(found, "request_success_total", finished_reason="stop") == 0
    assert value(found, "time_to_first_token_seconds_count") == 4
    assert value(found, "inter_token_latency_seconds_count") == 8
    assert value(found, "request_time_per_output_token_seconds_count") == 4
    assert value(found, "e2e_request_latency_seconds_count") == 4
    assert value(found, "request_queue_time_seconds_count") == 4
    assert value(found, "request_queue_time_seconds_sum") == 4 * StandIn.queued
    assert value(found, "request_prompt_tokens_sum") == 12
    assert value(found, "request_generation_tokens_bucket", le="5.0") == 4
    assert value(found, "request_generation_tokens_bucket", le="2.0") == 0
    assert value(found, "request_generation_tokens_sum") == 12
    # The stand-in guesses 3 tokens a step, of which 2 are accepted.
    assert value(found, "spec_decode_num_drafts_total", method="parrot") == 12
    assert value(found, "spec_decode_num_draft_tokens_total", method="parrot") == 36
    assert value(found, "spec_decode_num_accepted_tokens_total", method="parrot") == 24
    for position in "01":
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        assert value(found, name, method="parrot", position=position) == 12
    e2e, first = (
        value(found, f"{name}_sum") for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds")
    )
    decoding = value(found, "inter_token_latency_seconds_sum")
    assert e2e == pytest.approx(first + decoding)
    assert 0 < first <= e2e <= 4 * elapsed


def test_tokens_that_come_at_once_at_first_have_no_time_of_their_own() -> None:
    metrics = Metrics(MODEL, lambda: EngineStatus(slots=1))
    requests = [Request(name, (1, 2), SamplingParams(max_tokens=5)) for name in ("at once", "in two steps")]
    watch = metrics.watch(requests, time.perf_counter())
    watch.arrive([Delta("at once", 0, "", (1, 2, 3, 4, 5), finish_reason="length")])
    watch.arrive([Delta("in two steps", 0, "", (1, 2, 3))])
    watch.arrive([Delta("in two steps", 0, "", (4, 5), finish_reason="length")])
    found = samples(metrics.write("")[0].decode())
    assert value(found, "request_time_per_output_token_seconds_count") == 1
    between = value(found, "inter_token_latency_seconds_sum")
    assert value(found, "request_time_per_output_token_seconds_sum") == pytest.approx(between / 2)


def test_gauges_follow_the_engine(parrot: StandIn, stand: Server) -> None:
    with stand.client() as client:
        stream = client.completions.create(model=MODEL, prompt="abc", n=6, stream=True)
        until(lambda: stand.worker.status.waiting > 0)
        found = read(stand)
        assert value(found, "num_requests_running") == 4
        assert value(found, "num_requests_waiting") == 2
        assert value(found, "kv_cache_usage_perc") == 1
        stream.close()
    until(lambda: stand.worker.status.running == 0)
    found = read(stand)
    assert value(found, "num_requests_running") == value(found, "num_requests_waiting") == 0
    assert value(found, "request_aborted_total") == 6
    assert value(found, "request_failed_total") == 0


def test_a_failed_engine_is_counted(parrot: StandIn, stand: Server) -> None:
    parrot.breaks = RuntimeError("out of luck")
    pace(parrot, 1)
    with stand.client() as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="abc", n=2)
    found = read(stand)
    assert value(found, "request_failed_total") == 2
    assert value(found, "request_aborted_total") == 0
    assert value(found, "num_requests_running") == 0
    with stand.client() as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="abc", n=3)  # too late for the engine
    assert value(read(stand), "request_failed_total") == 5


def test_a_call_that_the_engine_failed_to_take_is_counted(parrot: StandIn, stand: Server) -> None:
    parrot.breaks_on_add = RuntimeError("out of luck")
    with stand.client() as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt=["abc", "d"], n=2)
    found = read(stand)
    assert value(found, "request_failed_total") == 4
    assert value(found, "request_aborted_total") == 0


def test_a_refused_call_is_not_counted_as_admitted(stand: Server) -> None:
    with stand.client() as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=["x", "x" * 300])
    found = read(stand)
    assert value(found, "request_aborted_total") == value(found, "request_failed_total") == 0


def test_no_key_is_asked_for_and_openmetrics_is_spoken() -> None:
    with serving(StandIn(), api_key="sesame") as server:
        read(server)
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        answer = httpx.get(f"{server.url}/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize("kind", ["text/plain; version=abc", "application/openmetrics-text; version=1.x"])
def test_a_version_that_is_none_gets_plain_text(stand: Server, kind: str) -> None:
    answer = httpx.get(f"{stand.url}/metrics", headers={"Accept": kind})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert samples(answer.text)


def test_speculation_of_a_real_engine_is_what_usage_says(server: Server, client: openai.OpenAI, engine: Engine) -> None:
    until(lambda: not engine.has_work)
    before = read(server)
    (token,) = engine.tokenizer.encode(" of")
    call: dict[str, Any] = {"model": MODEL, "prompt": "the and of", "max_tokens": 24, "n": 2}
    # The bias makes it say the same token for ever, which a look at the prompt soon guesses.
    answer = client.completions.create(**call, logit_bias={str(token): 100}, extra_body={"speculation": "suffix:4"})
    assert answer.usage is not None
    said = (answer.usage.model_extra or {})["speculation"]
    after = read(server)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    method = "suffix"  # what auto has for any model
    accepted = grown("spec_decode_num_accepted_tokens_total", method=method)
    assert accepted == said["accepted"] > 0
    assert grown("spec_decode_num_draft_tokens_total", method=method) == said["drafted"]
    assert 0 < grown("spec_decode_num_drafts_total", method=method) <= said["steps"]
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [grown(name, method=method, position=str(at)) for at in range(4)]
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True)
    assert grown("prompt_tokens_total") == answer.usage.prompt_tokens
    assert grown("generation_tokens_total") == answer.usage.completion_tokens == 48
    assert grown("prefix_cache_queries_total") >= answer.usage.prompt_tokens
    assert value(after, "kv_cache_usage_perc") == 0


def test_prefix_hits_of_a_real_engine(server: Server, client: openai.OpenAI, engine: Engine) -> None:
    prompt = list(range(40, 80))
    call: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
    client.completions.create(**call)
    before = read(server)
    client.completions.create(**call)
    after = read(server)
    size = engine.config.page_size
    hits, queries = (
        value(after, f"prefix_cache_{name}_total") - value(before, f"prefix_cache_{name}_total")
        for name in ("hits", "queries")
    )
    assert (hits, queries) == (40 // size * size, 40)
    client.completions.create(**call, echo=True, logprobs=1)  # a scored prompt is computed, not looked up
    assert value(read(server), "prefix_cache_queries_total") == value(after, "prefix_cache_queries_total")
