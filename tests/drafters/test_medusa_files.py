"""Medusa heads from published checkpoints and our own; what does not fit is refused before anything is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.medusa_files import load_heads, save_heads
from parlay.engine.checkpoint import CheckpointError, resolve
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel, load_model
from parlay.types import Request, SamplingParams
from tests.architectures import make_model
from tests.drafting import HIDDEN, tiny_medusa
from tests.tiny import VOCAB_SIZE

HEADS = 3
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def target(folder: Path) -> LoadedModel:
    return load_model(resolve(str(folder)), EngineConfig(str(folder), dtype="float32", self_check=False))


def published(folder: Path, change: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Tensors:
    """Writes heads as their authors did, with one residual block each and the whole vocabulary."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    tensors: Tensors = {}
    for head in range(HEADS):
        tensors[f"{head}.0.linear.weight"] = draw(HIDDEN, HIDDEN)
        tensors[f"{head}.0.linear.bias"] = draw(HIDDEN)
        tensors[f"{head}.1.weight"] = draw(VOCAB_SIZE, HIDDEN)
    change(tensors)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    about = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "medusa_num_heads": HEADS,
        "medusa_num_layers": 1,
        "transformers_version": "4.31.0",
    }
    (folder / "config.json").write_text(json.dumps(about | config))
    return tensors


def test_a_published_form(folder: Path, target: LoadedModel, tmp_path: Path) -> None:
    """It is read as it is, also where its description names too few heads, and it serves."""
    tensors = published(tmp_path, medusa_num_heads=2)
    heads = load_heads(str(tmp_path), target)
    assert (heads.shape.heads, heads.shape.layers, heads.shape.shared) == (HEADS, 1, False)
    assert heads.ids.equal(torch.arange(VOCAB_SIZE))
    for name, weight in heads.heads.state_dict().items():
        assert weight.equal(tensors[name].float())
    hidden = torch.randn(2, HIDDEN)
    for head, logits in enumerate(heads(hidden, HEADS)):
        state = hidden + torch.nn.functional.silu(
            hidden @ tensors[f"{head}.0.linear.weight"].float().T + tensors[f"{head}.0.linear.bias"].float()
        )
        torch.testing.assert_close(logits, state @ tensors[f"{head}.1.weight"].float().T)
    outputs = []
    for bet, drafters in ((None, {}), (Bet("medusa", Tree.chain(5)), {"medusa": str(tmp_path)})):
        engine = Engine(EngineConfig(str(folder), dtype="float64", speculation=bet, drafters=drafters))
        engine.add(Request("r", (5, 6, 7), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
        deltas = [delta for _ in range(40) for delta in engine.step()]
        assert any(delta.stats.drafted == HEADS for delta in deltas) == (bet is not None)
        outputs.append(tuple(token for delta in deltas for token in delta.tokens))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", [{}, {"layers": 2, "shared": False}], ids=["shared vocabulary", "two blocks"])
def test_what_is_saved_is_what_is_loaded(target: LoadedModel, tmp_path: Path, kind: dict[str, Any]) -> None:
    heads = tiny_medusa(**kind)
    save_heads(heads, tmp_path / "half", int8=False, base="a model")
    save_heads(heads, tmp_path / "int8", int8=True)
    half, int8 = (load_heads(str(tmp_path / name), target) for name in ("half", "int8"))
    assert half.shape == int8.shape == heads.shape
    assert half.ids.equal(heads.ids)
    for (name, weight), near, nearer in zip(
        heads.state_dict().items(), int8.state_dict().values(), half.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(nearer, weight, rtol=1e-3, atol=1e-3)
        if weight.ndim == 2:
            limit = weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-8)
            assert bool(((near - weight).abs() <= limit).all()), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["base_model_name_or_path"] == "a model"
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "int8" / "model.safetensors").values())
    assert size < 1.4 * sum(weight.numel() for weight in heads.parameters())  # biases and scales are not in int8


def narrow(tensors: Tensors) -> None:
    """All heads for hidden states of 16 numbers."""
    for name in tensors:
        tensors[name] = tensors[name][..., :16].contiguous() if name.endswith(".1.weight") else tensors[name]


def fewer_tokens(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:77] if name.endswith(".1.weight") else tensors[name]


BROKEN: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "another width": (narrow, {}, "made for hidden states of 16 numbers, and this model has 32; take heads of this"),
    "another vocabulary": (fewer_tokens, {}, "made for a vocabulary of 77 tokens, and this model has .*; take heads"),
    "tokens beyond the vocabulary": (
        lambda tensors: tensors.update(d2t=torch.full((VOCAB_SIZE,), 7)), {}, "tokens that the model does not have"
    ),
    "too few offsets": (
        lambda tensors: tensors.update(d2t=torch.zeros(7)), {}, "tokens that the model does not have"
    ),
    "a missing tensor": (lambda tensors: tensors.pop("1.0.linear.bias"), {}, "lacks 1.0.linear.bias"),
    "a missing vocabulary": (lambda tensors: tensors.pop("0.1.weight"), {}, "lacks 0.1.weight"),
    "an unknown tensor": (lambda tensors: tensors.update(lucky=torch.zeros(1)), {}, "has the unknown lucky"),
    "a tensor of another size": (
        lambda tensors: tensors.update({"2.0.linear.bias": torch.zeros(3)}), {}, "has other sizes in 2.0.linear.bias"
    ),
    "fewer heads than described": (lambda tensors: None, {"medusa_num_heads": 10**9}, "fewer Medusa heads than"),
    "fewer blocks than described": (lambda tensors: None, {"medusa_num_layers": 2}, "lacks 0.2.weight"),
    "no description": (lambda tensors: None, {"medusa_num_heads": None}, "it describes no Medusa heads"),
    "no heads": (lambda tensors: None, {"medusa_num_heads": 0}, "it describes no Medusa heads"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_heads_that_do_not_fit_are_refused(target: LoadedModel, tmp_path: Path, fault: str) -> None:
    change, config, message = BROKEN[fault]
    published(tmp_path, change, **config)
    with pytest.raises((ValueError, CheckpointError), match=message) as error:
        load_heads(str(tmp_path), target)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(folder: Path, target: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a Hugging Face id"):
        load_heads(str(tmp_path / "nowhere"), target)
    published(tmp_path)
    weights = tmp_path / "medusa_lm_head.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read .* fetch it again"):
        load_heads(str(tmp_path), target)
    weights.rename(tmp_path / "medusa_lm_head.pt")
    bet = Bet("medusa", Tree.chain(2))
    with pytest.raises(CheckpointError, match=r"only pickled weights, .* convert them to safetensors"):
        Engine(EngineConfig(str(folder), speculation=bet, drafters={"medusa": str(tmp_path)}))
    weights.write_bytes(whole)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_heads(str(tmp_path), target)
