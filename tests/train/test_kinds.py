"""Kinds of drafters beside heads, from `parlay train` to the engine: they learn, serve, go on and say how good they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from parlay.config import EngineConfig
from parlay.engine.checkpoint import resolve
from parlay.engine.engine import Engine
from parlay.engine.model import load_model
from parlay.train import dataset, loop
from parlay.train.draft_model import chosen_layers, new_student
from parlay.train.order import Kind, Order
from parlay.train.run import train
from parlay.types import Bet, Request, SamplingParams, Tree
from tests.architectures import EXTRA, make_model, plain_model
from tests.tiny import make_tiny_llama

KINDS: dict[Kind, dict[str, Any]] = {"self": {"exit": 1}, "draft_model": {"layers": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROUND", 10)
    monkeypatch.setattr(dataset, "HELD_OUT", 8)
    monkeypatch.setattr("parlay.train.conversations.QUESTION_TOKENS", 12)
    monkeypatch.setattr("parlay.train.conversations.ANSWER_TOKENS", 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def order(kind: Kind, folder: Path, out: Path, data: Path, **options: Any) -> Order:
    settings: dict[str, Any] = {"tokens": 1500, "epochs": 3, "batch": 128, "compile": "cached"}
    return Order(kind, str(folder), out, data / kind, **settings | KINDS[kind] | options)


def accepted(folder: Path, method: str | None, source: str = "") -> tuple[tuple[int, ...], int]:
    """A greedy output of the engine, and how many of the guesses in it were accepted."""
    bet = Bet(method, Tree.chain(3)) if method else None
    drafters = {method: source} if method else {}
    engine = Engine(EngineConfig(str(folder), dtype="float32", speculation=bet, drafters=drafters))
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    engine.add(Request("r", tuple(engine.tokenizer.encode("the answer")), params))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert not engine.drafters.failed
    return tuple(token for delta in deltas for token in delta.tokens), sum(delta.stats.accepted for delta in deltas)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_serves(folder: Path, data: Path, tmp_path: Path, kind: Kind) -> None:
    """It accepts more than before, in the engine too, where the output stays the target's own."""
    card = train(order(kind, folder, tmp_path, data, epochs=12))
    first, last = card.evaluations[0], card.evaluations[-1]
    print(first, last)
    assert last.tokens_per_step > first.tokens_per_step + 0.04
    assert (tmp_path / "README.md").read_text() == card.markdown
    assert f"Kind: `{kind}`" in card.markdown
    assert json.loads((tmp_path / "card.json").read_text())["evaluations"][-1]["step"] == last.step
    plain, _ = accepted(folder, None)
    guessed, good = accepted(folder, kind, str(tmp_path))
    print(good, accepted(folder, "self", "1")[1])
    assert guessed == plain
    assert good > 0
