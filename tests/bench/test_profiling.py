"""`parlay profile` on a tiny engine, and the script that shares its core."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from parlay.bench.steps import Case, Step, prompts_used, summarise
from parlay.cli import app
from tests.tiny import make_tiny_llama

PARTS = ["schedule", "plan", "draft", "verify", "accept", "detokenise", "commit"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"))
    (folder / "prompts.jsonl").write_text('{"prompt": "the other and the other"}\n{"prompt": "a sea in a sea"}\n')
    return str(folder)


@pytest.fixture(autouse=True)
def _restore_log_level() -> Iterator[None]:
    logger = logging.getLogger("parlay")
    level = logger.level
    yield
    logger.setLevel(level)


def profile(model: str, *arguments: str) -> Result:
    options = ("--dtype", "float32", "--no-self-check", "--compile", "off", "--repeats", "1", "--max-tokens", "8")
    data = ("--dataset", str(Path(model) / "prompts.jsonl"))
    return CliRunner().invoke(app, ["profile", "-m", model, *options, *data, *arguments])


def test_every_part_of_every_case_is_timed(model: str) -> None:
    answer = profile(model, "--rows", "1", "--rows", "2", "--json", "-")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    cases = [(c["case"]["rows"], c["case"]["speculation"], c["case"]["sampled"]) for c in found["cases"]]
    assert cases == [(rows, wish, sampled) for rows in (1, 2) for wish in ("off", "auto") for sampled in (False, True)]
    for case in found["cases"]:
        assert list(case["parts"]) == PARTS
        assert case["steps"] > 0
        assert 0 < case["parts"]["verify"] <= case["milliseconds"] * 2
    assert found["cases"][0]["tokens_per_second"]["median"] > 0
    assert all(part in answer.stderr for part in PARTS)


def test_only_what_was_asked_for(model: str) -> None:
    answer = profile(model, "--rows", "1", "--choice", "sampled", "--speculation", "off")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.count("sampled") == 1
    assert "greedy" not in answer.stdout


def test_rows_must_fit_into_a_step(model: str) -> None:
    answer = profile(model, "--rows", "5", "--max-num-seqs", "4")
    assert answer.exit_code == 2
    assert answer.stderr == "error: rows: 5 is more than --max-num-seqs 4; raise that\n"


def test_rows_must_fit_into_the_token_budget(model: str) -> None:
    answer = profile(model, "--rows", "16", "--max-num-batched-tokens", "8")
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: max_num_batched_tokens: must be at least max_num_seqs")


def test_only_prompts_that_are_timed_are_read(model: str, tmp_path: Path) -> None:
    lines = ["one sea", "two seas", "the other " * 1000]  # the last one is longer than the context
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    answer = profile(model, "--rows", "2", "--choice", "greedy", "--dataset", str(data))
    assert answer.exit_code == 0, answer.output
    cases = [Case(rows, "off", False) for rows in (1, 4)]
    assert (prompts_used(cases, 1), prompts_used(cases, 3)) == (4, 6)


def test_a_case_without_steps_is_no_result() -> None:
    case = Case(2, "off", False)
    with pytest.raises(ValueError, match="no step had 2 decoding rows") as raised:
        summarise(case, [[], []])
    for remedy in ("--max-tokens", "--max-num-batched-tokens", "--kv-cache-memory"):
        assert remedy in str(raised.value)


def test_medians_and_shares_of_steps() -> None:
    steps = [Step(2, 4, emitted, {"plan": 0.001, "verify": verify}) for emitted, verify in ((2, 0.003), (4, 0.005))]
    found = summarise(Case(2, "auto", False), [steps])
    assert found.milliseconds == pytest.approx(5)
    assert found.parts == {"plan": pytest.approx(1), "verify": pytest.approx(4)}
    assert found.others_share == pytest.approx(0.2)
    assert (found.guesses_per_row, found.tokens_per_step_row) == (2, 1.5)
    assert found.tokens_per_second is None
    plain = summarise(Case(2, "off", False), [steps]).tokens_per_second
    assert plain is not None
    assert plain.median == pytest.approx(600)
