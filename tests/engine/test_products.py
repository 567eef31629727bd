from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from parlay.config import EngineConfig
from parlay.engine import products
from parlay.engine.engine import Engine
from parlay.engine.products import FEW, SplitLinear
from parlay.types import Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5,), (1, 7), (2, 3), (FEW,), (1, FEW + 1)])
@torch.inference_mode()
def test_slabs_give_what_the_whole_gives(bias: bool, shape: tuple[int, ...]) -> None:
    whole = nn.Linear(10, 24, bias=bias)
    split = SplitLinear(whole, 4)
    hidden = torch.randn(*shape, 10)
    assert split(hidden).shape == (*shape, 24)
    assert torch.allclose(split(hidden), whole(hidden), atol=1e-6)
    assert split.slabs.data_ptr() == whole.weight.data_ptr(), "the weights are shared"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("parity", ["fast", "strict"])
def test_a_model_in_slabs_says_what_it_said(parity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "qwen2", torch.float32)  # biases in some layers, an odd vocabulary left whole
    monkeypatch.setattr(products, "_is_faster", lambda whole, parts: True)
    engine = Engine(EngineConfig.from_dict({"model": str(folder), "dtype": "float32", "parity": parity}))
    layers = list(engine.model.segments.model.modules())
    assert sum(isinstance(layer, SplitLinear) for layer in layers) >= 14
    prompt = (5, 6, 7, 5, 6, 7, 5)
    engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    tokens: tuple[int, ...] = ()
    while engine.has_work:
        tokens += tuple(token for delta in engine.step() for token in delta.tokens)
    assert tokens == greedy(plain_model(folder, torch.float32), prompt, 12)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_layers_stay_whole_where_slabs_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    monkeypatch.setattr(products, "_is_faster", lambda whole, parts: False)
    assert not products.split_products(model)
    monkeypatch.setattr(products, "_is_faster", lambda whole, parts: True)
    assert products.split_products(model)
    assert [type(layer) for layer in model] == [SplitLinear, nn.Linear], "three features have no two equal slabs"
