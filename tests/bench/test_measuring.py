"""`parlay measure`: what it counts is what happened, and `parlay plan` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from parlay.bench.measuring import Counts, comb
from parlay.bets import Bet, Tree
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.policy.workload import read_kinds
from tests.serving import MODEL, serving
from tests.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def measured(folder: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    """By kind, the acceptance that is written."""
    prompts = out.with_suffix(".jsonl")
    lines = [{"category": "ab"[number % 2], "prompt": f"what is {number} and the rest"} for number in range(6)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["measure", "--model", str(folder), "--dtype", "float32", "--max-tokens", "24", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--dataset", str(prompts), *options])
    assert done.exit_code == 0, done.output
    assert "acceptance by level and child" in done.output
    method = options[options.index("--speculation") + 1]
    return {kind.name: np.array(kind.acceptance[method]) for kind in read_kinds(str(out), method)}


def test_a_draft_model_that_is_the_target(folder: Path, tmp_path: Path) -> None:
    """Its first child is always right when greedy, and one of a few mostly is when sampled."""
    draft = ["--speculation", "draft_model", "--drafter", f"draft_model={folder}", "--width", "3", "--depth", "3"]
    for matrix in measured(folder, tmp_path / "greedy.json", *draft).values():
        assert matrix.tolist() == [[1, 0, 0]] * 3
    for matrix in measured(folder, tmp_path / "sampled.json", *draft, "--temperature", "1").values():
        # Drawn from the target's own distribution, the first is always accepted too.
        assert matrix.tolist() == [[1, 0, 0]] * 3


def test_another_drafter(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, tmp_path / "self.json", "--speculation", "self", "--drafter", "self=1", "--width", "4")
    document = json.loads((tmp_path / "self.json").read_text())
    for kind in document["kinds"]:
        matrix = found[kind["name"]]
        assert 0 < matrix[0].sum() < 1
        assert kind["trials"] == sorted(kind["trials"], reverse=True)
        for share, (low, high) in zip(matrix[0], kind["intervals"][0], strict=True):
            assert low - 1e-4 <= share <= high + 1e-4
    planned = CliRunner().invoke(app, ["plan", "--acceptance", str(tmp_path / "self.json")])
    assert "the profile has no costs for 'self'" in planned.output


def test_a_live_server(folder: Path) -> None:
    """By level, from the metrics of a real server."""
    bet = Bet("draft_model", Tree.chain(3))
    engine = Engine(EngineConfig(str(folder), dtype="float32", speculation=bet, drafters={"draft_model": str(folder)}))
    with serving(engine) as server:
        none = CliRunner().invoke(app, ["measure", "--url", server.url])
        assert none.exit_code == 2
        server.client().completions.create(model=MODEL, prompt="the answer is", max_tokens=21, temperature=0)
        done = CliRunner().invoke(app, ["measure", "--url", server.url, "--json"])
    (kind,) = json.loads(done.stdout)["kinds"]
    assert np.array(kind["acceptance"]["draft_model"])[0] == pytest.approx(1.0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    chance = np.random.default_rng(0)
    for truth in (0.02, 0.3, 0.9):
        held = 0
        for hits in chance.binomial(200, truth, 1000):
            low, high = Counts(np.array([[hits, 200.0 - hits]])).interval(0, 0)
            held += low <= truth <= high
        assert 0.92 < held / 1000 < 0.99


def test_a_comb() -> None:
    assert comb(3, 2) == Tree((-1, -1, -1, 0, 0, 0))
    assert comb(1, 4) == Tree.chain(4)
    assert len(comb(4, 5)) == 20
