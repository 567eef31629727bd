"""A trained early exit: what it guesses, its files, and what is said about those that do not fit."""

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
from parlay.drafters.early_exit import EarlyExit
from parlay.drafters.exit_part import load_exit, save_exit
from parlay.engine.batch import join, pack_row
from parlay.engine.checkpoint import CheckpointError, resolve
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel, load_model
from parlay.types import Request, SamplingParams
from tests.architectures import make_model, plain_model
from tests.drafting import engine_with, tiny_exit
from tests.operators import needs_operators

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def target(folder: Path) -> LoadedModel:
    return load_model(resolve(str(folder)), EngineConfig(str(folder), dtype="float32", self_check=False))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
@torch.inference_mode()
def test_it_goes_through_the_part_on_its_way_to_the_head(tmp_path: Path, kind: str) -> None:
    """With whatever the target does around its norm and head."""
    folder = make_model(tmp_path, kind)
    engine = engine_with(folder, "trained self", page_size=4)
    drafter = engine.drafters.by_name["self"]
    assert isinstance(drafter, EarlyExit)
    known = pack_row(PROMPT, len(PROMPT), [1, 2], 4)
    logits = drafter.forward(join([known], [True], drafter.device), None)
    part = tiny_exit()
    save_exit(part, tmp_path / "written", "tiny", int8=False)  # which rounds the weights
    part.load_state_dict(load_file(tmp_path / "written" / "model.safetensors"))
    plain = plain_model(folder)
    plain.model.layers[0].register_forward_hook(
        lambda _m, _a, out: (part.double()(out[0]), *out[1:]) if isinstance(out, tuple) else part.double()(out)
    )
    del plain.model.layers[1:]
    expected = plain(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # the target's norm works in float32


@needs_operators
def test_compiled_layers_run_in_front_of_it(folder: Path, tmp_path: Path) -> None:
    """The exit's layers are the target's compiled ones."""
    engine = engine_with(folder, "trained self", dtype="float32", compile="wait")
    assert all(engine.model.segments.programs)
    eager = engine_with(folder, "trained self", dtype="float32")
    outputs = []
    for one in (engine, eager):
        one.add(Request("r", PROMPT, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)))
        deltas = []
        while one.has_work:
            deltas += one.step()
        assert not one.drafters.failed
        outputs.append([token for delta in deltas for token in delta.tokens])
        assert sum(delta.stats.drafted for delta in deltas)
    assert outputs[0] == outputs[1]


def test_what_is_saved_is_what_is_loaded(target: LoadedModel, tmp_path: Path) -> None:
    part = tiny_exit()
    for name, int8, limit in (("half", False, 1e-3), ("int8", True, 1e-2)):
        save_exit(part, tmp_path / name, "tiny", int8)
        found = load_exit(tmp_path / name, target)
        assert found.shape == part.shape
        for (which, weight), read in zip(part.state_dict().items(), found.state_dict().values(), strict=True):
            torch.testing.assert_close(read, weight, rtol=limit, atol=limit, msg=which)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], str]] = {
    "another width": (nothing, {"hidden": 64}, "of 2 layers with 64 numbers each, and this model has 2 with 32; train"),
    "another depth": (nothing, {"layers": 30}, "after 1 of 30 layers .* and this model has 2 with 32; train one with"),
    "no layers": (nothing, {"exit": 0}, "leave after 0 of 2 layers"),
    "a missing tensor": (lambda tensors: tensors.pop("up.weight"), {}, "lacks up.weight"),
    "an unknown tensor": (lambda tensors: tensors.update(lucky=torch.zeros(1)), {}, "has the unknown lucky"),
    "a tensor of another size": (nothing, {"inner": 25}, "has other sizes in down.weight"),
    "a missing number": (nothing, {"inner": None}, "describes no trained exit .* parlay train --kind self"),
    "another kind": (nothing, {"architectures": ["LlamaForCausalLMEagle3"]}, "describes no trained exit .*Eagle3"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_exit_that_does_not_fit_is_refused(target: LoadedModel, tmp_path: Path, fault: str) -> None:
    change, config, message = BROKEN[fault]
    save_exit(tiny_exit(), tmp_path, "tiny", int8=False)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    about = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises((ValueError, CheckpointError), match=message) as error:
        load_exit(tmp_path, target)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(folder: Path, target: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="describes no trained exit"):
        load_exit(tmp_path, target)
    save_exit(tiny_exit(), tmp_path, "tiny", int8=False)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"cannot be read .* fetch it again"):
        load_exit(tmp_path, target)
    for source in ("0", "2", "1.5", str(tmp_path / "nowhere")):
        config = EngineConfig(
            str(folder), self_check=False, speculation=Bet("self", Tree.chain(2)), drafters={"self": source}
        )
        with pytest.raises(ValueError, match="the number of layers to run, from 1 to 1, or the folder of a trained"):
            Engine(config)
