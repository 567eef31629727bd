"""Heads from published checkpoints and our own; what does not fit is refused before anything is served."""

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
from parlay.drafters.eagle_files import load_head, save_head
from parlay.engine.checkpoint import CheckpointError, resolve
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel, load_model
from tests.architectures import make_model
from tests.drafting import tiny_head
from tests.tiny import VOCAB_SIZE, make_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def target(folder: Path) -> LoadedModel:
    return load_model(resolve(str(folder)), EngineConfig(str(folder), dtype="float32", self_check=False))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> None:
    """Changes a saved head's tensors and configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("joined", [False, True], ids=["published", "joined"])
def test_what_is_saved_is_what_is_loaded(target: LoadedModel, tmp_path: Path, joined: bool) -> None:
    head = tiny_head(joined=joined)
    save_head(head, tmp_path / "half", int8=False)
    save_head(head, tmp_path / "int8", int8=True)
    half, int8 = (load_head(str(tmp_path / name), target) for name in ("half", "int8"))
    assert half.shape == int8.shape == head.shape
    for (name, weight), near, nearer in zip(
        head.state_dict().items(), int8.state_dict().values(), half.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(nearer, weight, rtol=1e-3, atol=1e-3)
        if weight.ndim == 2:
            limit = weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-6)  # half a step of the scale
            assert bool(((near - weight).abs() <= limit).all()), name
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "int8" / "model.safetensors").values())
    assert size < 1.2 * sum(weight.numel() for weight in head.parameters())


def test_a_published_form(target: LoadedModel, tmp_path: Path) -> None:
    """Without layers' ids, with a mask of the target's vocabulary and an embedding, and under other names."""
    head = tiny_head(taps=(2, 1, 0))
    save_head(head, tmp_path, int8=False)

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        known = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        known[head.ids] = True
        tensors["t2d"], tensors["embed_tokens.weight"] = known, torch.zeros(VOCAB_SIZE, 32)
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    rewrite(tmp_path, publish, eagle_config=None, vocab_size=VOCAB_SIZE)
    found = load_head(str(tmp_path), target)
    assert found.shape.taps == (2, 1, 0)  # the default of a model with two layers
    assert found.ids.equal(head.ids)
    torch.testing.assert_close(
        found.midlayer.mlp.up_proj.weight, head.midlayer.mlp.up_proj.weight, rtol=1e-3, atol=1e-3
    )


def test_both_customs_of_counting_layers(target: LoadedModel, tmp_path: Path) -> None:
    save_head(tiny_head(), tmp_path, int8=False)
    rewrite(tmp_path, lambda tensors: None, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 1]})
    assert load_head(str(tmp_path), target).shape.taps == (1, 2, 2)
    rewrite(tmp_path, lambda tensors: None, eagle_config=None, eagle_aux_hidden_state_layer_ids=[0, 1, 1])
    assert load_head(str(tmp_path), target).shape.taps == (0, 1, 1)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], str]] = {
    "another width": (nothing, {"target_hidden_size": 64}, "made for hidden states of 64 numbers, and this model has"),
    "another vocabulary": (
        lambda tensors: tensors.update(t2d=torch.zeros(77, dtype=torch.bool)), {}, "a vocabulary of 77 tokens"
    ),
    "tokens beyond the vocabulary": (
        lambda tensors: tensors["d2t"].add_(VOCAB_SIZE), {}, "guesses tokens that the model does not have"
    ),
    "a missing tensor": (lambda tensors: tensors.pop("fc.weight"), {}, "lacks fc.weight"),
    "an unknown tensor": (
        lambda tensors: tensors.update(lucky=torch.zeros(1)), {}, "has the unknown lucky"
    ),
    "a tensor of another size": (nothing, {"intermediate_size": 50}, "has other sizes in midlayer.mlp"),
    "a layer that is not there": (
        nothing, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, "this model has 2"
    ),
    "no description": (nothing, {"hidden_size": None}, "describes no EAGLE-3 head"),
    "another encoding of positions": (
        nothing, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "position encoding .llama3. is not"
    ),
    "another residual": (nothing, {"norm_before_residual": True}, "norm_before_residual is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_head_that_does_not_fit_is_refused(target: LoadedModel, tmp_path: Path, fault: str) -> None:
    change, config, message = BROKEN[fault]
    save_head(tiny_head(), tmp_path, int8=False)
    rewrite(tmp_path, change, **config)
    with pytest.raises((ValueError, CheckpointError), match=message) as error:
        load_head(str(tmp_path), target)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(target: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a Hugging Face id"):
        load_head(str(tmp_path / "nowhere"), target)
    save_head(tiny_head(), tmp_path, int8=False)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read .* fetch it again"):
        load_head(str(tmp_path), target)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_head(str(tmp_path), target)


def engine(folder: Path, method: str, **drafters: str) -> Engine:
    return Engine(
        EngineConfig(str(folder), self_check=False, speculation=Bet(method, Tree.chain(2)), drafters=drafters)
    )


def test_what_is_said_about_drafters(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for method, drafters, message in (
        ("eagle", {}, "name a head with --drafter eagle="),
        ("draft_model", {}, "name the model with --drafter draft_model="),
        ("draft_model", {"draft_model": str(other)}, "has another tokenizer than the model"),
        ("draft_model", {"draft_model": str(tmp_path / "nowhere")}, "does not exist: check the path"),
        ("self", {"self": "2"}, "the number of layers to run, from 1 to 1"),
        ("suffix", {"suffix": "somewhere"}, "it has no weights to load"),
        ("suffix", {"eagle": "somewhere"}, "drafter eagle: nothing bets on it"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=message):
            engine(folder, method, **drafters)
