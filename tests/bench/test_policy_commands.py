"""`parlay plan` and `parlay simulate` as users call them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from parlay.cli import app
from parlay.policy.cost import DraftCost
from parlay.policy.profiles import read_profile

LOAD = ("--requests", "40", "--seeds", "1", "--lengths", "64,32")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_plan_shows_a_table_a_tree_and_the_break_even() -> None:
    result = run("plan", "--acceptance", "0.7,0.1", "--batch", "1,64,512", "--size", "8")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["1", "eagle"] for line in lines)
    assert any(line.split()[:2] == ["512", "none"] for line in lines)
    assert "└── " in result.stdout
    assert "break-even: a bet pays up to a batch size of" in result.stdout


def test_plan_for_rows_that_sample(tmp_path: Path) -> None:
    refused = run("plan", "--sampled")
    assert refused.exit_code == 2
    assert "sampled: the profile does not say what sampling takes" in refused.stderr
    dear = {"eagle": DraftCost(per_guess=0.002)}
    replace(read_profile("h100-llama-8b"), drawing=dear).save(path := tmp_path / "profile.json")
    found = []
    for some in ([], ["--sampled"]):
        printed = run("plan", "--profile", str(path), "--batch", "1", *some)
        numbers = json.loads(run("plan", "--profile", str(path), "--batch", "1", *some, "--json", "-").stdout)
        assert ("rows that sample" in printed.stdout) == numbers["sampled"] == bool(some)
        found.append(numbers["lines"][0]["guesses"])
    assert found[1] < found[0]


def test_plan_writes_numbers_and_a_picture(tmp_path: Path) -> None:
    picture, numbers = tmp_path / "plan.svg", tmp_path / "plan.json"
    result = run("plan", "--acceptance", "0.8,0.1", "--plot", str(picture), "--json", str(numbers), "--batch", "1,2")
    assert result.exit_code == 0
    found = json.loads(numbers.read_text())
    assert [line["batch"] for line in found["lines"]] == [1, 2]
    assert found["lines"][0]["speedup"] > 1.5
    assert len(found["lines"][0]["parents"]) == found["lines"][0]["guesses"]
    assert picture.read_text().startswith("<?xml")
    printed = run("plan", "--json", "-").stdout
    assert json.loads(printed)["break_even"] > 8


def test_exports_are_what_the_engines_read() -> None:
    bands = json.loads(run("plan", "--export", "vllm", "--batch", "1,256").stdout)
    assert bands[0][0] == 1
    assert all(low <= high for low, high, _ in bands)
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bands))
    assert bands[-1][1:] == [256, 0]
    schedule = json.loads(run("plan", "--export", "trtllm", "--batch", "256").stdout)
    assert {int(last): length for last, length in schedule.items()} == {last: k for _, last, k in bands if k}


def test_simulate_compares_policies_on_the_same_loads(tmp_path: Path) -> None:
    picture, numbers = tmp_path / "s.png", tmp_path / "s.json"
    result = run(
        "simulate", "--rate", "1,20", "--policies", "off,fixed:2,goodput", "--json", str(numbers),
        "--plot", str(picture), *LOAD,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("goodput: predicted acceptance was off by") == 2
    found = json.loads(numbers.read_text())
    assert [(o["load"], o["policy"]) for o in found["outcomes"]] == [
        (load, policy) for load in ("1/s", "20/s") for policy in ("off", "fixed:2", "goodput")
    ]
    off, fixed, goodput = (o["summary"]["latency_mean"] for o in found["outcomes"][:3])
    assert goodput < fixed < off
    assert picture.stat().st_size > 10_000


def test_simulate_takes_phases_and_traces(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{i / 5},{100 + i},{20 + i % 7}" for i in range(30)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    for load in (["--trace", str(trace)], ["--phases", "3x2,3x10", "--lengths", str(trace), "--cv", "3"]):
        result = run("simulate", "--policies", "off,oracle", "--seeds", "1", "--replicas", "2", *load)
        assert result.exit_code == 0, result.output
        assert "oracle" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--profile", "h100"], "no such built-in profile"),
        (["plan", "--batch", "1,x"], "write batch sizes"),
        (["plan", "--acceptance", "0.9,0.2"], "at most 1"),
        (["plan", "--method", "medusa"], "no costs for 'medusa', only for eagle"),
        (["plan", "--plot", "plan.jpeg"], "must end in"),
        (["simulate", "--policies", "of"], "did you mean 'off'"),
        (["simulate", "--policies", "off,off"], "named once"),
        (["plan", "--export", "vllm", "--json", "x"], "prints nothing else"),
        (["plan", "--acceptance", ""], "no such file, and no probabilities"),
        (["simulate", "--rate", "0"], "requests per second"),
        (["simulate", "--rate", "2,2"], "each once"),
        (["simulate", "--phases", "infx1"], "seconds and requests per second"),
        (["simulate", "--rate", "1", "--phases", "1x1"], "give one of them"),
        (["simulate", "--phases", "1-1"], "seconds and requests per second"),
        (["simulate", "--lengths", "3"], "tokens of prompt and output"),
        (["simulate", "--kv-tokens", "100"], "could never fit"),
        (["simulate", "--plot", "s.jpeg"], "must end in"),
        (["simulate", "--trace", "nowhere.csv"], "No such file"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.strip().count("\n") == 0
