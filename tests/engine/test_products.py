from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from parlay.config import EngineConfig
from parlay.engine import products
from parlay.engine.engine import Engine
from parlay.engine.products import PackedLinear
from parlay.types import Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5,), (1, 7), (2, 3), (1, 64)])
@torch.inference_mode()
def test_packed_weights_give_what_plain_ones_give(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    whole = nn.Linear(10, 24, bias=bias, dtype=dtype)
    if not products.can_pack(whole.weight):
        pytest.skip(f"oneDNN does not multiply {dtype} on this machine")
    hidden = torch.randn(*shape, 10, dtype=dtype)
    packed = PackedLinear(whole)(hidden)
    assert packed.shape == (*shape, 24)
    assert torch.allclose(packed, whole(hidden), atol=4 * torch.finfo(dtype).eps)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("parity", ["fast", "strict"])
def test_a_packed_model_says_what_it_said(parity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "qwen2", torch.float32)  # with biases in some layers and not in others
    monkeypatch.setattr(products, "_is_faster", lambda whole: True)
    engine = Engine(EngineConfig.from_dict({"model": str(folder), "dtype": "float32", "parity": parity}))
    layers = list(engine.model.segments.model.modules())
    assert sum(isinstance(layer, PackedLinear) for layer in layers) == 2 * 7 + 1
    prompt = (5, 6, 7, 5, 6, 7, 5)
    engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    tokens: tuple[int, ...] = ()
    while engine.has_work:
        tokens += tuple(token for delta in engine.step() for token in delta.tokens)
    assert tokens == greedy(plain_model(folder, torch.float32), prompt, 12)
    assert torch.get_num_threads() == 2


def test_layers_stay_as_they_are_where_packing_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    monkeypatch.setattr(products, "_is_faster", lambda whole: False)
    assert not products.pack_products(model, always=False)
    monkeypatch.setattr(products, "_is_faster", lambda whole: True)
    assert not products.pack_products(nn.Linear(4, 6, dtype=torch.float64), always=True), (
        "a type that oneDNN does not multiply"
    )
    assert products.pack_products(model, always=True)
    assert [type(layer) for layer in model] == [PackedLinear, nn.ReLU, PackedLinear]
