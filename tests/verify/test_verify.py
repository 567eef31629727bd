"""`parlay verify` against real servers: a correct one passes, and each planted fault is found from outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from parlay.bets import Bet, Tree
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.accept import Acceptor
from parlay.engine.engine import Engine
from parlay.engine.sampling import Draws, FreshDraws
from tests.serving import Server, serving
from tests.tiny import make_tiny_llama

PROMPTS: list[Path] = []
HEAT = "0.4"  # a random model's distributions are flat: this makes them like those of trained ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short ones: the model's context is."""
    PROMPTS[:] = [tmp_path_factory.mktemp("prompts") / "some.jsonl"]
    PROMPTS[0].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("hi", "one two", "why not")))
    return PROMPTS[0]


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Three guesses a step by the same model, but too sure of itself."""
    draft = tmp_path_factory.mktemp("draft") / "sure"
    shutil.copytree(folder, draft)
    weights = load_file(draft / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, draft / "model.safetensors", {"format": "pt"})
    return Engine(
        EngineConfig(
            str(folder), dtype="float32", device="cpu", max_num_seqs=8, self_check=False, compile="off", seed=3,
            speculation=Bet("draft_model", Tree.chain(3)), drafters={"draft_model": str(draft)},
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with serving(engine) as running:
        yield running


def verify(server: Server, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", "--url", server.url, "--dataset", str(PROMPTS[0]), *options])


def verdict(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def against_model(server: Server, folder: Path, *options: str, answers: int = 120) -> Result:
    usual = "--answers", str(answers), "--temperature", HEAT, "--dtype", "float32", "--json", "-"
    return verify(server, "--reference-model", str(folder), *usual, *options)


def failed(result: Result) -> set[str]:
    return {some["name"] for some in verdict(result)["sampled"]["statistics"] if abs(some["z"]) >= some["limit"]}


def test_a_correct_server_passes_beside_its_model(server: Server, folder: Path) -> None:
    result = against_model(server, folder)
    assert result.exit_code == 0, result.output
    found = verdict(result)
    assert not found["greedy"]["faults"]
    assert found["greedy"]["tokens"] > 50
    assert found["seeds"]["repeated"] == found["seeds"]["answers"] == 3
    assert found["sampled"]["tokens"] > 1000


def test_a_correct_server_passes_by_its_own_first_tokens(server: Server) -> None:
    result = verify(server, "--answers", "12", "--max-tokens", "12")
    assert result.exit_code == 0, result.output
    assert "lossless, as far as this test sees" in result.stdout
    assert "fails 0.1% of the time" in " ".join(result.stdout.split())


class WithoutResidual(Acceptor):
    """What follows a rejection is drawn as if nothing had been guessed."""

    def _residual(self, walks: Sequence[Any], target: torch.Tensor) -> list[int]:
        found = []
        for walk, line in zip(walks, target, strict=True):
            offered, guess = walk.proposal, walk.options[0]
            accepted = torch.rand(()) < line[guess] / offered[guess]
            found.append(guess if accepted else int(torch.multinomial(line, 1)))
        return found


class Likeliest(Acceptor):
    """Takes the likeliest token, whatever the temperature."""

    def _choose(self, walks: Sequence[Any], logits: torch.Tensor) -> list[int]:
        return logits.argmax(-1).tolist()


class Reused(Acceptor):
    """The same chance for all draws of a request, as in prototypes that draw it once per request."""

    def _choose(self, walks: Sequence[Any], logits: torch.Tensor) -> list[int]:
        found = []
        for walk, line in zip(walks, logits, strict=True):
            self.draws = Repeated(seed=walk.row.seq)
            found += super()._choose([walk], line[None])
        return found


class Repeated:
    """Every draw begins anew."""

    def __init__(self, seed: int) -> None:
        self._seed, self._own = seed, torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(FreshDraws(self._own.manual_seed(self._seed)), name)


@pytest.mark.parametrize("fault", [WithoutResidual, Likeliest, Reused])
def test_planted_faults_are_found(fault: type, engine: Engine, server: Server, folder: Path) -> None:
    kept = engine.acceptor
    torch.manual_seed(0)
    engine.acceptor = fault(kept.draws, kept.eos)
    try:
        result = against_model(server, folder)
    finally:
        engine.acceptor = kept
    assert result.exit_code == 1, result.output
    assert failed(result)


def test_chance_that_all_requests_share_is_found_one_at_a_time(engine: Engine, server: Server, folder: Path) -> None:
    """Several at a time, it depends on a request's place among them, which hides much of it."""
    kept, shared = engine.acceptor, cast(Draws, Repeated(seed=1))
    torch.manual_seed(0)
    engine.acceptor = Acceptor(shared, kept.eos)
    try:
        result = against_model(server, folder, "--concurrency", "1", answers=30)
    finally:
        engine.acceptor = kept
    assert result.exit_code == 1, result.output
    assert failed(result)


def test_wrong_greedy_tokens_are_faults_and_not_ties(server: Server, tmp_path: Path) -> None:
    """The server has another model than the reference."""
    other = make_tiny_llama(tmp_path, seed=1)
    options = "--answers", "4", "--max-tokens", "8", "--dtype", "float32"
    result = verify(server, "--reference-model", str(other), *options)
    assert result.exit_code == 1
    assert "greedy: FAILS" in result.stdout
    assert "NOT lossless" in result.stdout


def test_what_cannot_be_tested_is_said(server: Server) -> None:
    nobody = CliRunner().invoke(app, ["verify", "--url", "http://127.0.0.1:9"])
    assert nobody.exit_code == 2
    assert "cannot be tested" in nobody.stderr
    assert verify(server, "--temperature", "0.5").exit_code != 0
    both = verify(server, "--reference-url", server.url, "--reference-model", "x")
    assert both.exit_code != 0
    other = verify(server, "--model", "another")
    assert other.exit_code == 2
    assert "another" in other.stderr
