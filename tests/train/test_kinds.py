"""Kinds of drafters beside heads, from `parlay train` to the engine: they learn, serve, and go on learning."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from parlay.bets import Bet, Tree
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.drafters.eagle_files import save_head
from parlay.drafters.exit_part import save_exit
from parlay.drafters.medusa_files import save_heads
from parlay.engine.checkpoint import CheckpointError, resolve
from parlay.engine.engine import Engine
from parlay.engine.model import load_model
from parlay.train import loop, run
from parlay.train.draft_model import chosen_layers, new_student
from parlay.train.order import Kind, Order
from parlay.train.run import train
from parlay.types import Request, SamplingParams
from tests.architectures import make_model, plain_model
from tests.drafting import tiny_exit, tiny_head, tiny_medusa
from tests.tiny import make_tiny_llama

KINDS: dict[Kind, dict[str, Any]] = {"self": {"exit": 1}, "draft_model": {"layers": 1}}


pytestmark = pytest.mark.usefixtures("few_and_short")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


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
    assert last.tokens_per_step > first.tokens_per_step + 0.04
    assert (tmp_path / "README.md").read_text() == card.markdown
    assert f"Kind: `{kind}`" in card.markdown
    assert json.loads((tmp_path / "card.json").read_text())["evaluations"][-1]["step"] == last.step
    plain, _ = accepted(folder, None)
    guessed, good = accepted(folder, kind, str(tmp_path))
    assert guessed == plain
    assert good > accepted(folder, "self", "1")[1]  # which both began as


@pytest.mark.parametrize(("kind", "options"), [("self", {}), ("draft_model", {"on_policy": 0.5})])
def test_training_goes_on_where_it_was_broken_off(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, options: dict[str, Any]
) -> None:
    train(order(kind, folder, tmp_path / "whole", data, epochs=1, **options))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    step, steps = loop.Training._step, []

    def failing(self: loop.Training, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(loop.Training, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(order(kind, folder, tmp_path / "parts", data, epochs=1, **options))
    torch.rand(7)  # another process has other randomness
    train(order(kind, folder, tmp_path / "parts", data, epochs=1, **options))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_which_layers_a_draft_model_begins_with() -> None:
    def layers(count: int | None, of: int) -> tuple[int, ...]:
        return chosen_layers(Order("draft_model", "", Path(), Path(), layers=count), of)

    assert layers(None, 30) == (0, 10, 19, 29)
    assert layers(None, 4) == layers(1, 4) == (0,)
    assert layers(5, 9) == (0, 2, 4, 6, 8)
    for count in (0, 9, 20):
        with pytest.raises(ValueError, match=f"layers: must be from 1 to 8, fewer than the model's, not {count}"):
            layers(count, 9)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "smollm3"])
def test_a_draft_model_begins_as_layers_of_the_target(tmp_path: Path, kind: str) -> None:
    """With the second of two layers it computes what the target does without its first; kinds of layers are kept."""
    folder = make_model(tmp_path, kind)
    config = EngineConfig(str(folder), dtype="float32", self_check=False)
    student = new_student(load_model(resolve(str(folder)), config), (1,))
    plain = plain_model(folder, torch.float32)
    layers = plain.transformer.h if kind == "gpt2" else plain.model.layers
    layers[0].register_forward_hook(lambda _m, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(student(tokens).logits, plain(tokens).logits)
    assert student.config.num_hidden_layers == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_is_gone_on_with(folder: Path, data: Path, tmp_path: Path, kind: Kind) -> None:
    """It begins where the other ended; a draft model's vocabulary stays as it is."""
    first = train(order(kind, folder, tmp_path / "first", data, int8=False))
    more = Order(kind, str(folder), tmp_path / "more", data / kind, str(tmp_path / "first"), tokens=1500, epochs=1)
    then = train(more)
    assert then.evaluations[0].accepted == pytest.approx(first.evaluations[-1].accepted, abs=0.02)
    assert then.evaluations[0] != first.evaluations[0]
    assert then.parameters == first.parameters
    size = {"self": "exit", "draft_model": "layers"}[kind]
    with pytest.raises(ValueError, match=f"{size}: is that of the drafter that --start names; leave --{size} out"):
        train(replace(more, **KINDS[kind]))


def test_a_draft_model_is_a_model_as_any_other(folder: Path, data: Path, tmp_path: Path) -> None:
    """In bfloat16 or float16, with a tokenizer: it can be served by itself."""
    for half in (True, False):
        train(order("draft_model", folder, tmp_path / str(half), data, epochs=1, int8=half))
        types = {tensor.dtype for tensor in load_file(tmp_path / str(half) / "model.safetensors").values()}
        assert types == {torch.bfloat16 if half else torch.float16}
    engine = Engine(EngineConfig(str(tmp_path / "True"), speculation=None))
    assert engine.tokenizer.encode("the answer")


def test_what_cannot_be_trained_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    for kind, options, message in (
        ("self", {"exit": 2}, "exit: must be from 1 to 1 layers, not 2"),
        ("draft_model", {"layers": 2}, "layers: must be from 1 to 1, fewer than the model's, not 2"),
        ("self", {"on_policy": 0.5}, "on_policy: means nothing for a drafter of kind self; leave --on-policy out"),
        ("eagle", {"on_policy": 0.5}, "on_policy: means nothing for a drafter of kind eagle"),
        ("eagle", {"heads": 3}, "heads: means nothing for a drafter of kind eagle; leave --heads out"),
        ("eagle", {"start": "/nowhere"}, "/nowhere is neither a folder nor a Hugging Face id"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=message):
            train(Order(kind, str(folder), tmp_path, data / kind, **options))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_drafter_of_another_model_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    """That is said before anything is recorded."""
    save_exit(tiny_exit(layers=9), tmp_path / "self", "other", int8=False)
    save_head(tiny_head(taps=(1, 9)), tmp_path / "eagle", int8=False)
    kinds: tuple[Kind, ...] = ("self", "eagle")
    for kind in kinds:
        start = str(tmp_path / kind)
        with pytest.raises(ValueError, match=rf"start: {start} (is of a model of|reads layers)"):
            train(Order(kind, str(folder), tmp_path / "out", tmp_path / "data", start))
    assert not (tmp_path / "data").exists()


def test_drafters_are_saved_whatever_the_device_of_training(tmp_path: Path) -> None:
    head, heads = tiny_head(), tiny_medusa()
    with torch.device("meta"):
        save_head(head, tmp_path / "eagle", int8=True)
        save_heads(heads, tmp_path / "medusa", int8=True)
    assert (
        load_file(tmp_path / "eagle" / "model.safetensors")["d2t"].tolist() == (head.ids - torch.arange(100)).tolist()
    )
    assert (tmp_path / "medusa" / "model.safetensors").exists()


def test_the_command(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Order, "__init__", functools.partialmethod(run.Order.__init__, compile="cached"))
    arguments = ["train", str(tmp_path), "--model", str(folder), "--data", str(data / "draft_model"), "--json"]
    more = ["--tokens", "1500", "--epochs", "1", "--kind", "draft_model", "--layers", "1", "--on-policy", "0.25"]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0
    card = json.loads(done.stdout)
    assert (card["kind"], card["order"]["layers"], card["order"]["on_policy"]) == ("draft_model", 1, 0.25)
