"""From replies to numbers, on numbers made by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from parlay.bench.client import Failure, Reply, Usage
from parlay.bench.objectives import meets, parse_objectives
from parlay.bench.serving import Outcome, Traffic
from parlay.bench.summary import RequestResult, peak, request_results, summarise
from parlay.bench.workloads import Prompt
from parlay.types import SpeculationStats

USAGE = Usage(10, 5, SpeculationStats(steps=3, drafted=8, accepted=2))
REPLY = Reply(
    sent=101.0,
    ended=103.0,
    chunks=(101.5, 101.75, 102.5),
    text="abc",
    usage=USAGE,
    finish_reason="length",
    failure=None,
)


def results(*replies: Reply, due: float = 100.75) -> list[RequestResult]:
    outcomes = tuple(Outcome(Prompt("chat", "hi"), due, reply) for reply in replies)
    return request_results(Traffic(100.0, outcomes, 0))


def test_the_times_of_a_request() -> None:
    [result] = results(REPLY)
    assert (result.due, result.sent, result.lag) == (0.75, 1.0, 0.25)
    assert result.ttft == 0.5
    assert result.tpot == 0.25  # one second for four tokens after the first
    assert result.e2e == 2.0
    assert result.chunks == (0.5, 0.75, 1.5)
    assert (result.input_tokens, result.output_tokens, result.counted) == (10, 5, "usage")


def test_chunks_count_as_tokens_without_usage() -> None:
    [result] = results(replace(REPLY, usage=None))
    assert (result.input_tokens, result.output_tokens, result.counted) == (None, 3, "chunks")
    assert result.tpot == 0.5
    summary = summarise([result], 0, False, {})
    assert (summary.counted, summary.input_tokens, summary.speculation) == ("chunks", None, None)
    assert summarise([*results(REPLY), result], 0, False, {}).counted == "usage and chunks"


def test_what_an_answer_lacks_is_not_made_up() -> None:
    silent, short = results(replace(REPLY, chunks=(), text=""), replace(REPLY, chunks=(101.5,)))
    assert (silent.ttft, silent.tpot) == (None, None)
    assert (short.ttft, short.tpot) == (0.5, None)
    summary = summarise([silent], 0, False, {})
    assert (summary.completed, summary.ttft, summary.itl, summary.lag) == (1, None, None, None)


def test_the_summary_of_three() -> None:
    later = replace(REPLY, sent=102.0, ended=105.0, chunks=(103.0, 104.0))
    failed = replace(REPLY, sent=104.0, ended=104.5, failure=Failure("HTTP 500", "oops"))
    summary = summarise(results(REPLY, later, failed), 2, True, {"ttft": 0.5})
    assert (summary.completed, summary.failed, summary.unfinished) == (2, 1, 2)
    assert summary.seconds == 4.0
    assert summary.peak_concurrency == 2
    assert summary.requests_per_second == 0.5
    assert (summary.input_tokens, summary.output_tokens) == (20, 10)
    assert (summary.input_tokens_per_second, summary.output_tokens_per_second) == (5.0, 2.5)
    assert summary.ttft is not None
    assert dataclasses.astuple(summary.ttft) == pytest.approx((2, 0.75, 0.75, 0.95, 0.995))
    assert summary.itl is not None
    assert (summary.itl.count, summary.itl.p50) == (3, 0.75)
    assert summary.lag is not None
    assert (summary.lag.count, summary.lag.p50) == (3, 1.25)
    assert summary.goodput == 0.25
    assert summary.speculation is not None
    assert summary.speculation.stats == SpeculationStats(6, 16, 4)
    assert summary.speculation.tokens_per_step == pytest.approx(10 / 6)
    assert summary.speculation.acceptance == 0.25


def test_errors_are_counted_by_kind_with_an_example() -> None:
    kinds = [("HTTP 429", "first"), ("timeout", "long"), ("timeout", "longer")]
    summary = summarise(results(*(replace(REPLY, failure=Failure(*kind)) for kind in kinds)), 0, False, {})
    assert [(error.kind, error.count, error.example) for error in summary.errors] == [
        ("timeout", 2, "long"),
        ("HTTP 429", 1, "first"),
    ]
    assert (summary.completed, summary.output_tokens, summary.e2e) == (0, 0, None)


def test_nothing_at_all() -> None:
    summary = summarise([], 3, True, {})
    assert (summary.seconds, summary.requests_per_second, summary.unfinished) == (0, 0, 3)


def test_peak_counts_those_that_overlap() -> None:
    times = [(0.0, 1.0), (1.0, 1.0), (1.5, 2.0), (1.75, 0.25)]
    [made] = results(REPLY)
    assert peak(replace(made, sent=sent, e2e=took) for sent, took in times) == 3


def test_objectives() -> None:
    objectives = parse_objectives("ttft:500ms, tpot:0.05s,e2e:2s")
    assert objectives == {"ttft": 0.5, "tpot": 0.05, "e2e": 2.0}
    assert meets({"ttft": 0.5, "tpot": None, "e2e": 1.0}, objectives)
    assert not meets({"ttft": 0.51, "tpot": None, "e2e": 1.0}, objectives)
    assert not meets({"ttft": None, "tpot": None, "e2e": 1.0}, objectives)
    assert meets({"ttft": None, "tpot": None, "e2e": 1.0}, {"e2e": 2.0, "tpot": 0.05})


@pytest.mark.parametrize("text", ["ttft", "ttft:500", "speed:3s", "ttft:5s,", "ttft:-1s"])
def test_other_objectives_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="as ttft:500ms,tpot:50ms"):
        parse_objectives(text)
