from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from parlay.config import EngineConfig
from parlay.engine import native, products
from parlay.engine.engine import Engine
from parlay.engine.products import PackedLinear
from parlay.types import Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model
from tests.operators import needs_operators

pytestmark = needs_operators


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10, 24), (33, 32), (1, 1), (64, 100)])
@torch.inference_mode()
def test_packed_weights_give_what_plain_ones_give(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    whole = nn.Linear(*shape, bias=bias, dtype=dtype)
    packed = PackedLinear(whole)
    exact = nn.Linear(*shape, bias=bias, dtype=torch.float64)
    exact.load_state_dict(whole.state_dict())
    for tokens in ((1, 1), (5,), (1, 7), (2, 3), (1, 64), (101,), (0,)):
        hidden = torch.randn(*tokens, shape[0], dtype=dtype)
        out = packed(hidden)
        assert out.shape == (*tokens, shape[1])
        assert out.dtype is dtype
        assert torch.allclose(out.double(), exact(hidden.double()), rtol=torch.finfo(dtype).eps, atol=3e-6)


@torch.inference_mode()
def test_a_token_gets_the_same_bits_whatever_is_beside_it(threads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed = PackedLinear(nn.Linear(70, 50, dtype=dtype))
        hidden = torch.randn(61, 70, dtype=dtype)
        together = packed(hidden)
        parts = [slice(first, first + count) for first in (0, 9, 50) for count in (1, 2, 5, 7)]
        assert all(torch.equal(packed(hidden[part]), together[part]) for part in parts)
        torch.set_num_threads(3 - threads)
        assert torch.equal(packed(hidden), together)


@torch.inference_mode()
def test_weights_that_fit_in_bfloat16_are_kept_so_without_a_loss() -> None:
    whole = nn.Linear(20, 20)
    assert PackedLinear(whole).weight.dtype is torch.float32
    whole.weight.copy_(whole.weight.to(torch.bfloat16))
    packed = PackedLinear(whole)
    assert packed.weight.dtype is torch.bfloat16
    hidden = torch.randn(9, 20)
    assert torch.allclose(packed(hidden), whole(hidden), atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_an_int8_checkpoint_stay_int8_without_a_loss(dtype: torch.dtype, bias: bool) -> None:
    whole = nn.Linear(50, 70, bias=bias)
    scale = (torch.rand(70, 1) + 0.1) / 100
    weight = torch.randint(-127, 128, (70, 50)).float()
    weight[:, 0] = 127
    weight[3] = 0
    whole.weight.copy_(weight * scale)
    packed = PackedLinear(whole, dtype)
    assert packed.weight.dtype is torch.int8
    assert PackedLinear(whole).weight.dtype is torch.float32, "a target's weights are kept exactly"
    scales = packed.to(torch.bfloat16).scale
    assert scales is not None
    assert scales.dtype is torch.float32, "what was packed stays as it is"
    for tokens in (1, 2, 5, 7, 61):
        hidden = torch.randn(tokens, 50).to(dtype)
        out = packed(hidden)
        assert out.dtype is dtype
        assert torch.allclose(out.float(), whole(hidden.float()), rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(packed(hidden[:1]), out[:1])


@torch.inference_mode()
def test_weights_that_may_be_rounded_are(threads: int) -> None:
    whole = nn.Linear(50, 70)
    assert PackedLinear(whole, torch.bfloat16).weight.dtype is torch.bfloat16
    assert PackedLinear(whole, torch.float32).weight.dtype is torch.float32


@torch.inference_mode()
def test_layers_the_other_way_round() -> None:
    whole = Conv1D(12, 20)
    hidden = torch.randn(2, 3, 20)
    assert torch.allclose(PackedLinear(whole)(hidden), whole(hidden), atol=1e-6)


@pytest.mark.parametrize("parity", ["fast", "strict"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # with biases in some layers and not in others
def test_a_packed_model_says_what_it_said(kind: str, parity: str, tmp_path: Path, threads: int) -> None:
    folder = make_model(tmp_path, kind, torch.float32)
    engine = Engine(EngineConfig.from_dict({"model": str(folder), "dtype": "float32", "parity": parity}))
    layers = list(engine.model.segments.model.modules())
    assert sum(isinstance(layer, PackedLinear) for layer in layers) == 2 * (7 if kind == "qwen2" else 4) + 1
    prompt = (5, 6, 7, 5, 6, 7, 5)
    engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    tokens: tuple[int, ...] = ()
    while engine.has_work:
        tokens += tuple(token for delta in engine.step() for token in delta.tokens)
    assert tokens == greedy(plain_model(folder, torch.float32), prompt, 12)
    assert torch.get_num_threads() == threads


def test_other_types_and_machines_without_a_compiler_keep_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6, dtype=torch.float64), nn.ReLU(), nn.Linear(6, 3))
    products.pack_products(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, PackedLinear]
    model = nn.Sequential(nn.Linear(6, 3))
    monkeypatch.setattr(native, "load", lambda: False)
    products.pack_products(model)
    assert type(model[0]) is nn.Linear
