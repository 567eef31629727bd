"""A server is recorded while it serves, and the simulator replays it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.engine.recording import Recording
from parlay.policy.recording import is_recording, read_recording
from parlay.types import Request, SamplingParams, StepReport
from tests.tiny import make_tiny_llama

PROMPT = tuple([5, 6, 7, 8] * 6)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    engine = Engine(EngineConfig(str(folder), dtype="float64", device="cpu", self_check=False, compile="off"))
    path = tmp_path_factory.mktemp("recording") / "trace.jsonl"
    recording = Recording(engine, path)
    engine.listeners.append(recording.note)
    biased = SamplingParams(temperature=0, max_tokens=20, logit_bias={9: 100}, ignore_eos=True)
    for number in range(6):
        engine.add(Request(str(number), (*PROMPT, number), biased, time.perf_counter()))
        engine.step()
    engine.add(Request("gone", PROMPT, SamplingParams(max_tokens=200, ignore_eos=True), time.perf_counter()))
    engine.step()
    engine.abort("gone")
    while engine.has_work:
        engine.step()
    recording.close()
    return path


def test_it_says_what_became_of_every_request_and_nothing_of_its_text(recorded: Path) -> None:
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert is_recording(recorded)
    choices = lines[1:-1]
    assert len(choices) == 6  # without the one that was aborted
    for choice in choices:
        assert (choice["prompt"], choice["output"], choice["end"]) == (25, 20, "length")
        assert choice["arrival"] < choice["first"] <= choice["finish"]
        assert choice["steps"] < 20
        tried, accepted = (np.sum(choice["outcomes"]["suffix"][name]) for name in ("tried", "accepted"))
        assert 0 < accepted <= tried
    assert "profile" in lines[-1]
    assert not {"tokens", "text"} & set(choices[0])


def test_it_is_read_back(recorded: Path) -> None:
    found = read_recording(recorded)
    assert len(found.workload) == 6
    assert (found.workload.output == 20).all()
    assert (found.workload.prompt <= 25).all()
    assert found.workload.arrival[0] == 0
    assert (found.latency >= found.ttft).all()
    assert found.profile is not None
    assert {method for kind in found.kinds for method in kind.acceptance} == {"suffix"}
    assert found.kinds[0].matrix("suffix")[0, 0] > 0.6  # it was always right


def test_it_is_simulated_under_any_policy(recorded: Path) -> None:
    answer = CliRunner().invoke(
        app, ["simulate", "--trace", str(recorded), "--policies", "off,fixed:2,goodput", "--seeds", "1", "--json", "-"]
    )
    assert answer.exit_code == 0, answer.output
    outcomes = json.loads(answer.stdout)["outcomes"]
    assert [outcome["policy"] for outcome in outcomes] == ["off", "fixed:2", "goodput"]
    assert all(outcome["requests"] == 6 for outcome in outcomes)
    shown = CliRunner().invoke(app, ["simulate", "--trace", str(recorded), "--policies", "off", "--seeds", "1"])
    assert "measured (auto)" in shown.output


def test_a_line_that_was_cut_off_is_left_out_and_others_are_named(recorded: Path, tmp_path: Path) -> None:
    text, path = recorded.read_text(), tmp_path / "cut.jsonl"
    path.write_text(text[: text.rindex("\n", 0, -1) + 40])
    assert len(read_recording(path).workload) == 6
    for broken, message in (
        (text.replace("\n", "\n{]\n", 1), "line 2"),
        (text.replace('"arrival"', '"arriving"'), "no request ended"),
        (text.replace('"parlay_recording":1', '"parlay_recording":7'), "format is 7"),
        (text.replace('"output"', '"outputs"', 1), "output"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_recording(path)


@pytest.mark.failures
def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(
        EngineConfig(str(make_tiny_llama(tmp_path)), dtype="float64", device="cpu", self_check=False, compile="off")
    )

    def full(report: StepReport) -> None:
        raise OSError(28, "No space left on device")

    engine.listeners.append(full)
    engine.add(Request("a", PROMPT, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    tokens = 0
    while engine.has_work:
        tokens += sum(len(delta.tokens) for delta in engine.step())
    assert tokens == 5
    assert engine.listeners == []
    assert "hears no more steps" in caplog.text


def test_a_recording_without_bets_is_refused_in_a_sentence(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    entries = [json.loads(line) for line in recorded.read_text().splitlines()]
    path.write_text("".join(json.dumps(e | ({"outcomes": {}} if "outcomes" in e else {})) + "\n" for e in entries))
    with pytest.raises(ValueError, match="nothing was bet in it"):
        read_recording(path)
