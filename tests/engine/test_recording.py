"""A server is recorded while it serves, and the simulator replays it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.engine.recording import EVERY, Recording
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
    recording.start()
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
        assert choice["starts"] == sorted(set(choice["starts"]))
        assert len(choice["starts"]) < 20
        place, size, hits, *sure = choice["shown"]["suffix"][-1]  # it was always right
        assert place in choice["starts"]
        assert hits == size == len(sure) <= 20 - place
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


def test_a_drafter_is_tried_whatever_the_policy_says(tmp_path: Path) -> None:
    """One step in sixteen tries it, though it never pays; such trials are known as what they are."""
    folder = make_tiny_llama(tmp_path / "tiny")
    config = EngineConfig(
        str(folder), dtype="float64", device="cpu", self_check=False, compile="off", drafters={"self": "1"}, seed=0
    )
    engine, path = Engine(config), tmp_path / "trace.jsonl"
    plain = [answer(engine, number) for number in range(4)]
    recording = Recording(engine, path)
    recording.start()
    assert [answer(engine, number) for number in range(4)] == plain
    recording.close()
    choices = [json.loads(line) for line in path.read_text().splitlines()[1:-1]]
    explored = [choice["explored"]["self"]["tried"][0][0] for choice in choices if choice["explored"]]
    bets = sum(choice["outcomes"]["self"]["tried"][0][0] for choice in choices if "self" in choice["outcomes"])
    steps = sum(len(choice["starts"]) for choice in choices)
    assert 0.3 * steps / EVERY < sum(explored) < 3 * steps / EVERY
    assert bets >= sum(explored)
    assert read_recording(path).kinds


def answer(engine: Engine, number: int) -> list[int]:
    engine.add(Request(str(number), (*PROMPT, number), SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)))
    found: list[int] = []
    while engine.has_work:
        found += [token for delta in engine.step() for token in delta.tokens]
    return found


def written(choices: list[dict[str, object]], path: Path) -> Path:
    """A recording of these."""
    common = {"arrival": 0.0, "first": 0.1, "finish": 1.0, "prompt": 5, "cached": 0, "end": "stop", "explored": {}}
    entries = [{"parlay_recording": 2}, *(common | {"starts": [], "shown": {}} | choice for choice in choices)]
    path.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))
    return path


def test_what_is_typical_of_a_drafter_is_what_steps_found_that_explored(tmp_path: Path) -> None:
    """Bets were made where they won 9 of 10 times; tried everywhere, guesses are right half of the time."""
    bets = {"eagle": {"tried": [[100]], "accepted": [[90]]}}
    tried = {"eagle": {"tried": [[400]], "accepted": [[200]]}}
    choices: list[dict[str, object]] = [{"output": 500, "outcomes": bets, "explored": tried} for _ in range(4)]
    kinds = read_recording(written(choices, tmp_path / "a")).kinds
    assert kinds[0].matrix("eagle")[0, 0] == pytest.approx(0.5, abs=0.02)
    for choice in choices:
        choice["explored"] = {}
    assert read_recording(written(choices, tmp_path / "a")).kinds[0].matrix("eagle")[0, 0] > 0.85


def test_guesses_that_were_shown_last_until_they_are_wrong(tmp_path: Path) -> None:
    """Two of three came true, and a step took them; at the fourth token nothing was shown, nor at the last."""
    choice = {
        "output": 5,
        "outcomes": {"suffix": {"tried": [[1], [1], [1]], "accepted": [[1], [1], [0]]}},
        "starts": [0, 3, 4],
        "shown": {"suffix": [[0, 3, 2, 0.9, 0.8, 0.7], [4, 1, 0, 0.5]], "prompt_lookup": [[3, 2, 1]]},
    }
    found = read_recording(written([choice], tmp_path / "a")).workload.shown
    (shown,) = found["suffix"]
    assert shown.hits == (2, 1, 0, 0, 0)
    sure = [None if offer is None else offer.confidence for offer in shown.offers]
    assert sure == [(0.9, 0.8, 0.7), (0.8, 0.7), (0.7,), None, (0.5,)]
    (unsure,) = found["prompt_lookup"]
    assert unsure.hits == (0, 0, 0, 1, 0)
    assert [None if offer is None else (len(offer.tree), offer.confidence) for offer in unsure.offers[3:]] == [
        (2, None),
        None,
    ]
    choice["shown"]["prompt_lookup"] = None  # it showed a tree once
    assert read_recording(written([choice], tmp_path / "a")).workload.shown.keys() == {"suffix"}


def test_a_line_that_was_cut_off_is_left_out_and_others_are_named(recorded: Path, tmp_path: Path) -> None:
    text, path = recorded.read_text(), tmp_path / "cut.jsonl"
    path.write_text(text[: text.rindex("\n", 0, -1) + 40])
    assert len(read_recording(path).workload) == 6
    for broken, message in (
        (text.replace("\n", "\n{]\n", 1), "line 2"),
        (text.replace('"arrival"', '"arriving"'), "no request ended"),
        (text.replace('"parlay_recording":2', '"parlay_recording":7'), "format is 7"),
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


@pytest.mark.failures
def test_exploring_that_fails_ends_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(
        str(make_tiny_llama(tmp_path)), dtype="float64", device="cpu", self_check=False, compile="off"
    )
    engine = Engine(config)
    plain, policy = answer(engine, 1), engine.policy

    class Broken:
        @property
        def awake(self) -> bool:
            return True

        def bets(self, *_: Any) -> None:
            raise RuntimeError("broken")

    engine.explorer = cast("Any", Broken())
    assert answer(engine, 1) == plain
    assert engine.explorer is None
    assert engine.policy is policy
    assert "exploring failed" in caplog.text


def test_a_recording_without_bets_is_refused_in_a_sentence(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    entries = [json.loads(line) for line in recorded.read_text().splitlines()]
    path.write_text("".join(json.dumps(e | ({"outcomes": {}} if "outcomes" in e else {})) + "\n" for e in entries))
    with pytest.raises(ValueError, match="nothing was bet in it"):
        read_recording(path)
