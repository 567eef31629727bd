"""What the monitor says of an engine is what its steps did."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.engine.monitor import SECONDS, Monitor
from parlay.types import Request, SamplingParams, StepReport
from tests.tiny import make_tiny_llama

SAME = (5, 6, 7, 5, 6, 7, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def new_engine(folder: Path, **options: object) -> Engine:
    options = {"self_check": False, "compile": "off", "max_num_seqs": 4, "calibrate": "skip"} | options
    return Engine(EngineConfig(str(folder), dtype="float64", device="cpu", **options))  # pyright: ignore[reportArgumentType]


def request(name: str, **params: object) -> Request:
    greedy: dict[str, object] = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    return Request(name, SAME, SamplingParams(**(greedy | params)))  # pyright: ignore[reportArgumentType]


def test_points_add_up_to_what_was_done(folder: Path) -> None:
    engine = new_engine(folder, speculation=Bet("prompt_lookup", Tree.chain(3)))
    monitor, reports = Monitor(engine), list[StepReport]()
    engine.listeners.append(reports.append)
    for name in "abc":
        engine.add(request(name))
    while engine.has_work:
        engine.step()
    found = monitor.snapshot()
    seconds = [*monitor._history]
    results = [(row, got) for report in reports for row, got in zip(report.rows, report.result.rows, strict=True)]
    assert sum(some.tokens for some in seconds) == sum(len(got.emitted) for _, got in results) == 90
    assert sum(some.steps for some in seconds) == len(reports)
    shares = sum((some.shares for some in seconds), Counter[str]())
    bet = Counter(f"prompt_lookup:{got.tree.depth}" if len(got.tree) else "off" for _, got in results if got.emitted)
    assert shares == bet
    assert shares["off"]
    assert len(shares) > 1
    first = found["acceptance"]["prompt_lookup"][0]
    drafts = [got for _, got in results if len(got.tree)]
    assert first["tried"] == len(drafts)
    assert first["accepted"] == sum(bool(got.accepted) for got in drafts) / len(drafts)
    assert found["requests"] == []
    assert found["choices"] is None  # fixed bets are no estimates
    json.dumps(found, allow_nan=False)


def test_a_live_request_is_shown_with_its_last_tree(folder: Path) -> None:
    engine = new_engine(folder, max_num_seqs=2)
    monitor = Monitor(engine)
    for name, wish in (("a", Bet("suffix", Tree.chain(2))), ("b", "off"), ("c", "off")):
        engine.add(request(name, speculation=wish))
    for _ in range(12):
        engine.step()
    shown = {line["id"]: line for line in monitor.snapshot()["requests"]}
    assert set(shown) == {"a", "b"}  # the third has not begun
    assert shown["a"]["wish"] == "own bet"
    assert shown["b"]["wish"] == "off"
    assert shown["a"]["guesses"] == len(shown["a"]["tree"]) <= 2
    assert shown["b"]["output"] == shown["b"]["steps"] == 12
    assert shown["a"]["output"] >= shown["a"]["steps"]
    engine.abort("a")
    assert [line["id"] for line in monitor.snapshot()["requests"]] == ["b"]
    while engine.has_work:
        engine.step()
    assert monitor.snapshot()["requests"] == []


def test_what_is_aborted_unseen_is_forgotten(folder: Path) -> None:
    engine = new_engine(folder)
    monitor = Monitor(engine)
    for number in range(50):
        engine.add(request(str(number)))
        engine.step()
        engine.abort(str(number))
    assert len(monitor._choices) <= 2 * engine.config.max_num_seqs + 1


def test_only_the_last_minutes_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(folder, speculation=Bet("prompt_lookup", Tree.chain(3)))
    monitor = Monitor(engine)
    engine.add(request("a"))
    while engine.has_work:
        engine.step()
    last = monitor._history[-1].at
    for later, shown in ((1.5, True), (SECONDS + 2.0, False)):
        monkeypatch.setattr("parlay.engine.monitor.time.perf_counter", lambda later=later: last + later)
        found = monitor.snapshot()
        assert (last in [point["at"] for point in found["points"]]) is shown
        assert bool(found["acceptance"]) is bool(found["passes"]) is shown


def test_another_policys_steps_are_not_this_ones(folder: Path) -> None:
    engine = new_engine(folder, policy="off")
    monitor = Monitor(engine)
    engine.add(request("a", max_tokens=60))
    for _ in range(20):
        engine.step()
    engine.use_policy("goodput")
    assert monitor.snapshot()["choices"] is None
    while engine.has_work:
        engine.step()
    assert monitor.snapshot()["choices"]["others"]["off"] > 0


def test_the_adaptive_policy_is_compared_with_others(folder: Path) -> None:
    engine = new_engine(folder, calibrate="quick")
    monitor = Monitor(engine)
    for name in "abcd":
        engine.add(request(name, max_tokens=150))
    while engine.has_work:
        engine.step()
    found = monitor.snapshot()
    assert found["policy"] == "auto"
    assert found["cost"]["new"] == sorted(set(found["cost"]["new"]))
    assert len(found["cost"]["new"]) == len(found["cost"]["live"]) == len(found["cost"]["profiled"])
    assert found["passes"]
    compared = found["choices"]
    assert compared["others"]["off"] > 0
    assert compared["regret_to_off"] == pytest.approx(compared["ms_per_token"] / compared["others"]["off"] - 1)
    assert compared["regret_to_best"] >= compared["regret_to_off"]
    assert any(second.expected_seconds for second in monitor._history)
    json.dumps(found, allow_nan=False)
