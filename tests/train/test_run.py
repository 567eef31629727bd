"""`parlay train`, whole, on a tiny model: data of its own, a head that gets better, interruptions, a card."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from parlay.bets import Bet, Tree
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.train import conversations, loop, run
from parlay.train.conversations import Conversations
from parlay.train.order import Kind, Order
from parlay.train.recording import recording_engine
from parlay.train.run import train
from parlay.types import Delta, Request, SamplingParams
from tests.tiny import VOCAB_SIZE, make_tiny_llama

pytestmark = pytest.mark.usefixtures("few_and_short")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that counts: behind every token it says the one with the next number.

    Medusa heads can learn nothing of a random model, whose tokens do not foretell those two places later.
    """
    folder = make_tiny_llama(tmp_path_factory.mktemp("counting"))
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    turned = 2 * math.pi * torch.arange(VOCAB_SIZE)[:, None] * torch.arange(1, 17) / VOCAB_SIZE
    places = torch.cat([turned.cos(), turned.sin()], dim=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(places)
        model.lm_head.weight.copy_(10 * places.roll(1, 0))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def read_by_the_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with other states than the other kinds of drafters read."""
    return tmp_path_factory.mktemp("read-by-the-head")


def order(folder: Path, out: Path, data: Path, kind: Kind = "eagle", **options: Any) -> Order:
    settings: dict[str, Any] = {"tokens": 1500, "epochs": 3, "batch": 128, "compile": "cached"}
    if "start" not in options:
        settings |= {"vocab": 200} | ({"intermediate": 48} if kind == "eagle" else {})
    if kind == "eagle":
        settings["turns"] = 3
    return Order(kind, str(folder), out, data, **settings | options)


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_a_head_learns_and_serves(
    folder: Path, data: Path, counting: Path, read_by_the_head: Path, tmp_path: Path, kind: Kind
) -> None:
    """It accepts more than before, in the engine too, where the output stays the target's own."""
    folder, texts = {"eagle": (folder, data), "medusa": (counting, read_by_the_head)}[kind]
    card = train(order(folder, tmp_path, texts, kind, epochs=12))
    first, last = card.evaluations[0], card.evaluations[-1]
    assert last.tokens_per_step > first.tokens_per_step + 0.04
    assert card.kind == kind
    assert card.tokens >= 1500
    assert (tmp_path / "README.md").read_text() == card.markdown
    assert json.loads((tmp_path / "card.json").read_text())["evaluations"][-1]["step"] == last.step
    outputs = {}
    for speculation in (None, Bet(kind, Tree.chain(3))):
        drafters: dict[str, str] = {kind: str(tmp_path)} if speculation else {}
        engine = Engine(EngineConfig(str(folder), dtype="float32", speculation=speculation, drafters=drafters))
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        engine.add(Request("r", tuple(engine.tokenizer.encode("the answer")), params))
        outputs[speculation] = [delta for _ in range(100) for delta in engine.step()]
    plain, guessed = (tuple(t for d in deltas for t in d.tokens) for deltas in outputs.values())
    assert plain == guessed
    assert sum(delta.stats.accepted for delta in outputs[Bet(kind, Tree.chain(3))]) > 0


def test_a_question_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read while the model wrote a question is not read again with the answer."""
    engines: list[Engine] = []

    def noting(config: EngineConfig, taps: Sequence[int]) -> Engine:
        engines.append(recording_engine(config, taps))
        return engines[-1]

    monkeypatch.setattr(run, "recording_engine", noting)
    train(order(folder, tmp_path, tmp_path / "data", tokens=1000, epochs=1))
    scheduler = engines[0].scheduler
    assert scheduler.prefix_hits > scheduler.prefix_queries / 4


def test_training_goes_on_where_it_was_broken_off(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(order(folder, tmp_path / "whole", data))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    step, steps = loop.Training._step, []

    def failing(self: loop.Training, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(loop.Training, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(order(folder, tmp_path / "parts", data))
    train(order(folder, tmp_path / "parts", data))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_a_head_is_gone_on_with(
    folder: Path, data: Path, read_by_the_head: Path, counting: Path, tmp_path: Path, kind: Kind
) -> None:
    """It begins where the other ended, with the same layers and vocabulary."""
    folder, texts = {"eagle": (folder, data), "medusa": (counting, read_by_the_head)}[kind]
    taps: dict[str, Any] = {"taps": (1, 2)} if kind == "eagle" else {}
    first = train(order(folder, tmp_path / "first", texts, kind, int8=False, epochs=12, **taps))
    more = order(folder, tmp_path / "more", texts, kind, start=str(tmp_path / "first"), epochs=1)
    then = train(more)
    assert then.evaluations[0].accepted == pytest.approx(first.evaluations[-1].accepted, abs=0.02)
    assert then.evaluations[0] != first.evaluations[0]
    assert then.parameters == first.parameters
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "more")]
    assert configs[0] == configs[1]
    with pytest.raises(ValueError, match="vocab: is that of the drafter that --start names; leave --vocab out"):
        train(replace(more, vocab=100))


def test_products_are_rounded_where_that_is_fast(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on in float32 beside them, and comes to much the same."""
    cards = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(loop, "fastest_dtype", lambda device, dtype=dtype: dtype)
        cards.append(train(order(folder, tmp_path / str(dtype), data, epochs=12)))
    exact, rounded = (card.evaluations[-1].tokens_per_step for card in cards)
    assert rounded == pytest.approx(exact, abs=0.15)
    assert rounded > cards[1].evaluations[0].tokens_per_step + 0.04


def test_data_stays_within_its_budget(folder: Path, tmp_path: Path) -> None:
    card = train(order(folder, tmp_path, tmp_path / "data", tokens=100_000, disk=1_500_000, epochs=1))
    assert sum(file.stat().st_size for file in (tmp_path / "data").iterdir()) < 1_500_000
    assert 0 < card.tokens < 100_000


def test_data_of_another_kind_is_not_mixed_in(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was recorded from .* name another folder"):
        train(order(folder, tmp_path, data, seed=1))


def test_data_serves_heads_that_read_fewer_layers(folder: Path, data: Path, tmp_path: Path) -> None:
    """With another order of layers the states are still each layer's own."""
    texts = tmp_path / "data"
    train(order(folder, tmp_path / "more", texts, epochs=1, taps=(0, 1, 2)))
    fewer = train(order(folder, tmp_path / "fewer", texts, epochs=1, taps=(2, 0)))
    own = train(order(folder, tmp_path / "own", tmp_path / "own data", epochs=1, taps=(2, 0)))
    assert [one.accepted for one in fewer.evaluations] == [one.accepted for one in own.evaluations]
    train(order(folder, tmp_path / "high", tmp_path / "high data", epochs=1, taps=(2,)))
    with pytest.raises(ValueError, match="was recorded from"):
        train(order(folder, tmp_path / "low", tmp_path / "high data", epochs=1, taps=(0,)))


def test_it_runs_on_one_device(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: 'cuda:0,cuda:1' names several, and training runs on one"):
        train(order(folder, tmp_path, data, device="cuda:0,cuda:1"))


def test_what_cannot_go_on_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    train(order(folder, tmp_path, data, epochs=1))
    with pytest.raises(ValueError, match="was trained with another vocab; name another folder"):
        train(order(folder, tmp_path, data, epochs=1, vocab=100))
    train(order(folder, tmp_path, data, epochs=1, tokens=2500))  # it keeps the data that it began with
    with pytest.raises(ValueError, match="taps: must be layers from 0 to 2, not 1, 99"):
        train(order(folder, tmp_path / "other", data, taps=(1, 99)))
    with pytest.raises(ValueError, match="none leaves room for an answer"):
        train(order(folder, tmp_path / "long", tmp_path / "nothing", prompts=("word " * 400,)))


def test_time_that_is_over_at_once(folder: Path, data: Path, tmp_path: Path) -> None:
    """A head that was not trained can be gone on with."""
    card = train(order(folder, tmp_path, data, minutes=1e-6))
    assert card.evaluations[-1].step == 0
    assert train(order(folder, tmp_path, data)).evaluations[-1].step > 0


def test_given_prompts_are_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(str(folder), speculation=None, self_check=False, max_num_seqs=2))
    added: list[Request] = []
    add = engine.add

    def noting(request: Request) -> None:
        added.append(request)
        add(request)

    monkeypatch.setattr(engine, "add", noting)
    conversations = Conversations(engine, ["the thing", "another", "too long " * 250], "seed")
    assert conversations.run(5) >= 5
    conversations.stop()
    assert not engine.has_work
    texts = {engine.tokenizer.decode(request.prompt) for request in added}
    assert all("the thing" in text or "another" in text for text in texts)
    assert {request.params.temperature for request in added} > {0.0}
    with pytest.raises(ValueError, match="prompts: none leaves room for an answer"):
        Conversations(engine, ["too long " * 250], "seed")


def test_some_questions_are_about_earlier_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MATERIAL", 3)
    monkeypatch.setattr(conversations, "TASK_SHARE", 0.5)
    engine = Engine(EngineConfig(str(folder), speculation=None, self_check=False, max_num_seqs=2))
    added: list[Request] = []
    add, step, answers = engine.add, engine.step, dict[str, str]()

    def noting(request: Request) -> None:
        added.append(request)
        add(request)

    def stepping() -> list[Delta]:
        deltas = step()
        for delta in deltas:
            answers[delta.request_id] = answers.get(delta.request_id, "") + delta.text
        return deltas

    monkeypatch.setattr(engine, "add", noting)
    monkeypatch.setattr(engine, "step", stepping)
    Conversations(engine, (), "seed").run(12)
    tasks = [tuple(engine.tokenizer.encode(task, add_special_tokens=False)) for task in conversations.TASKS]
    texts = [
        engine.tokenizer.decode(request.prompt) for request in added if request.id.startswith(conversations.ANSWER)
    ]
    about = [text for text in texts if any(engine.tokenizer.decode(task).strip() in text for task in tasks)]
    assert 0 < len(about) < len(texts)
    earlier = [answer.strip() for name, answer in answers.items() if name.startswith(conversations.ANSWER)]
    assert all(any(answer in text for answer in earlier) for text in about)


def test_the_command(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Order, "__init__", functools.partialmethod(run.Order.__init__, compile="cached"))
    arguments = ["train", str(tmp_path), "--model", str(folder), "--data", str(data), "--tokens", "1500"]
    done = CliRunner().invoke(app, [*arguments, "--epochs", "1", "--vocab", "100", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["kind"] == "eagle"


def test_the_command_for_medusa_heads(
    counting: Path, read_by_the_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Order, "__init__", functools.partialmethod(run.Order.__init__, compile="cached"))
    arguments = ["train", str(tmp_path), "--model", str(counting), "--data", str(read_by_the_head), "--tokens", "1500"]
    done = CliRunner().invoke(app, [*arguments, "--epochs", "1", "--kind", "medusa", "--heads", "2", "--float16"])
    assert done.exit_code == 0
    assert "Kind: `medusa`" in done.stdout
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["medusa_num_heads"], about["base_model_name_or_path"]) == (2, str(counting))
    assert load_file(tmp_path / "model.safetensors")["1.0.linear.weight"].dtype == torch.float16
