"""`parlay bench` against servers that answer, refuse, hang up and are interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from parlay.bench import serving
from parlay.bench.arrivals import schedule
from parlay.bench.client import Target, Wish
from parlay.bench.online import base_url
from parlay.bench.serving import Planned
from parlay.bench.summary import peak, request_results
from parlay.bench.workloads import Prompt
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from tests.bench.scripted import scripted
from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, until
from tests.serving import serving as running_server
from tests.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real engine behind a real port."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig(str(folder), dtype="float32", device="cpu", self_check=False, compile="off")
    with running_server(Engine(config)) as running:
        yield running


@pytest.fixture
def echo() -> Iterator[Server]:
    """One that repeats prompts."""
    with running_server(StandIn()) as running:
        yield running


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def measured(*arguments: str) -> dict[str, Any]:
    answer = bench(*arguments, "--json", "-")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def test_all_at_once_with_a_limit(server: Server) -> None:
    found = measured(
        *("--url", server.url, "--dataset", "synthetic:12,6", "--num-prompts", "10", "--concurrency", "3"),
        *("--ignore-eos", "--slo", "e2e:60s", "--seed", "5"),
    )
    settings, summary, requests = found["settings"], found["summary"], found["requests"]
    assert found["environment"]["packages"]["parlay"]
    assert settings["model"] == MODEL  # which the server was asked for
    assert (settings["rate"], settings["max_tokens"], settings["distinct_prompts"]) == (None, 6, 10)
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (10, 0, 0)
    assert (summary["output_tokens"], summary["counted"]) == (60, "usage")
    assert summary["input_tokens"] == sum(request["input_tokens"] for request in requests)
    assert summary["peak_concurrency"] == 3
    assert summary["goodput"] == pytest.approx(summary["requests_per_second"])
    assert summary["lag"] is None
    assert summary["speculation"]["stats"]["steps"] > 0
    assert {request["output_tokens"] for request in requests} == {6}
    for request in requests:
        assert 0 < request["ttft"] <= request["e2e"]
        assert request["chunks"] == sorted(request["chunks"])
        assert request["failure"] is None
        assert request["finish_reason"] == "length"


def test_open_loop_follows_the_schedule(server: Server) -> None:
    found = measured(
        *("--url", f"{server.url}/v1/", "-m", MODEL, "--num-prompts", "6", "--rate", "40", "--max-tokens", "4"),
        *("--endpoint", "completions", "--speculation", "off", "--seed", "3"),
    )
    due = [request["due"] for request in found["requests"]]
    assert due == pytest.approx(schedule(40.0, 6, seed=3))
    assert all(request["sent"] >= request["due"] for request in found["requests"])
    assert found["summary"]["lag"]["count"] == 6
    assert found["summary"]["speculation"]["stats"]["drafted"] == 0


def test_no_request_waits_for_another() -> None:
    """Nothing is answered before all have been sent."""
    engine = StandIn(paced=True)
    assert engine.pace is not None
    pace = engine.pace
    plan = [Planned(Prompt("all", "abc"), at) for at in schedule(200.0, 12, seed=1)]

    def answer_when_all_are_there() -> None:
        until(lambda: len(engine.live) == len(plan))
        pace.release()

    answering = threading.Thread(target=answer_when_all_are_there)
    with running_server(engine) as server:
        answering.start()
        traffic = serving.send(Target(server.url, MODEL), Wish(1), plan, None)
        answering.join()
    results = request_results(traffic)
    assert peak(results) == len(results) == 12
    assert all(earlier.sent <= later.sent for earlier, later in pairwise(results))


def test_the_tables_say_what_was_measured(echo: Server) -> None:
    answer = bench("--url", echo.url, "--num-prompts", "3", "--max-tokens", "4", "--dataset", "synthetic:5")
    assert answer.exit_code == 0
    text = " ".join(answer.stdout.split())
    assert "tiny: 3 requests of synthetic:5 words, all at once" in text
    assert "output tokens/s (12 in all, by usage)" in text
    assert "guesses accepted, of 36 66.7%" in text
    for name in ("TTFT", "TPOT", "ITL", "E2E", "p99"):
        assert name in text
    assert "schedule lag" not in text
    assert "requests" in answer.stderr  # the progress bar


def test_json_goes_to_a_file(echo: Server, tmp_path: Path) -> None:
    file = tmp_path / "out" / "run.json"
    data = tmp_path / "set.jsonl"
    data.write_text('{"category": "a", "prompt": "one"}\n')
    answer = bench(
        "--url", echo.url, "--num-prompts", "2", "--dataset", str(data), "--max-tokens", "3", "--json", str(file)
    )
    assert answer.exit_code == 0
    found = json.loads(file.read_text())
    assert found["settings"]["dataset"] == "set.jsonl"
    assert [request["category"] for request in found["requests"]] == ["a", "a"]
    assert "different prompts" in answer.stdout


def test_a_file_that_cannot_be_written_is_told_before_the_load(tmp_path: Path) -> None:
    with scripted([b"data: [DONE]\n\n"]) as server:
        answer = bench("--url", server.url, "-m", "m", "--num-prompts", "1", "--json", str(tmp_path))
    assert answer.exit_code == 2
    assert "Is a directory; name a file that can be written" in answer.stderr
    assert server.bodies == []


def test_refusals_are_counted_and_fail_when_all_are(echo: Server) -> None:
    answer = bench("--url", echo.url, "--num-prompts", "4", "--dataset", "synthetic:300", "--max-tokens", "1")
    assert answer.exit_code == 1
    assert "HTTP 400" in answer.stdout
    assert "longer than the context" in answer.stdout


def test_some_failures_are_no_failure_of_the_run(echo: Server, tmp_path: Path) -> None:
    data = tmp_path / "set.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 500}) + '\n{"prompt": "short"}\n')
    found = measured("--url", echo.url, "--num-prompts", "6", "--dataset", str(data), "--max-tokens", "2")
    assert (found["summary"]["completed"], found["summary"]["failed"]) == (3, 3)
    [error] = found["summary"]["errors"]
    assert (error["kind"], error["count"]) == ("HTTP 400", 3)


@pytest.mark.parametrize(
    ("status", "whole", "kind"), [(500, True, "HTTP 500"), (429, True, "HTTP 429"), (200, False, "broken stream")]
)
def test_servers_that_fail_end_no_run(status: int, whole: bool, kind: str) -> None:
    piece = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    with scripted([piece], status=status, whole=whole) as server:
        answer = bench("--url", server.url, "-m", "m", "--num-prompts", "5", "--rate", "500", "--json", "-")
    assert answer.exit_code == 1
    summary = json.loads(answer.stdout)["summary"]
    assert [(error["kind"], error["count"]) for error in summary["errors"]] == [(kind, 5)]
    assert len(server.bodies) == 5


def test_what_servers_say_is_shown_as_they_say_it() -> None:
    with scripted([b"no [bold] luck [/b]"], status=500) as server:
        answer = bench("--url", server.url, "-m", "m", "--num-prompts", "1")
    assert "no [bold] luck [/b]" in answer.stdout


def test_a_server_without_usage() -> None:
    piece = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    with scripted([piece, piece, b"data: [DONE]\n\n"]) as server:
        found = measured("--url", server.url, "-m", "m", "--num-prompts", "2")
    assert (found["summary"]["output_tokens"], found["summary"]["counted"]) == (4, "chunks")
    assert found["summary"]["input_tokens"] is None
    assert "speculation" not in json.loads(server.bodies[0])


def test_an_interrupted_run_reports_what_is_finished() -> None:
    engine = StandIn(paced=True)
    assert engine.pace is not None
    with running_server(engine) as server:
        program = "from parlay.cli import app; app()"
        options = ["--url", server.url, "--num-prompts", "4", "--concurrency", "2", "--dataset", "synthetic:4,1"]
        with subprocess.Popen(
            [sys.executable, "-c", program, "bench", *options, "--json", "-"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                until(lambda: len(engine.live) == 2)
                first = set(engine.live)
                engine.pace.release()
                until(lambda: len(engine.live) == 2 and not first & engine.live.keys())
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
                until(lambda: len(engine.aborted) == 2)
            finally:
                process.kill()
    assert process.returncode == 130, err
    summary = json.loads(out)["summary"]
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (2, 0, 2)
    assert "unfinished when interrupted" in err
    assert "Traceback" not in err


def test_the_key_is_shown_and_not_told() -> None:
    with running_server(StandIn(), api_key="sesame") as server:
        key = ("--api-key", "sesame")
        answer = bench("--url", server.url, *key, "--num-prompts", "1", "--dataset", "synthetic:4,2", "--json", "-")
        assert answer.exit_code == 0
        assert "sesame" not in answer.output
        refused = bench("--url", server.url)
    assert refused.exit_code == 2
    assert "HTTP 401" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "127.0.0.1:8000"], "write the server's address"),
        (["--url", "http://me:pass@host"], "a key goes to --api-key"),
        (["--url", "http://127.0.0.1:9"], "is the server running?"),
        (["--rate", "0"], "requests per second"),
        (["--slo", "ttft"], "ttft:500ms"),
        (["--dataset", "/nowhere"], "No such file"),
        (["--dataset", "synthetic:3,4", "--max-tokens", "5"], "give one"),
        (["--concurrency", "0"], "--concurrency"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    answer = bench(*arguments)
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_addresses() -> None:
    assert base_url("http://h:1/v1/") == base_url("http://h:1/") == base_url("http://h:1") == "http://h:1"
    assert base_url("https://h/deep/v1") == "https://h/deep"
