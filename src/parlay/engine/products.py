"""Matrix products of few tokens on CPU, with weights packed once in the order in which they are read.

PyTorch's own linear layer rearranges float32 weights at every call, and is slow where tokens are
few. The C++ operator is made for these; `benchmarks/verify_pass.py` compares whole passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from parlay.engine import native
from parlay.engine.memory import Shelf

DTYPES = frozenset((torch.float32, torch.bfloat16))
ROUNDING = 1e-6  # of a line's largest weight: how exactly int8 must hold it


class PackedLinear(nn.Module):
    """A linear layer with packed weights.

    A float32 weight that bfloat16 holds exactly, as of a checkpoint in bfloat16, is kept in bfloat16: it is half as
    much to read, and the product is the same, since the operator computes in float32.

    Args:
        whole: The layer that it stands for; its bias is shared, its weight copied.
        rounded: A type that its weight may be rounded to, as a drafter's may; one from a checkpoint in int8 stays int8.
    """

    def __init__(self, whole: nn.Linear | Conv1D, rounded: torch.dtype | None = None) -> None:
        super().__init__()
        weight = whole.weight.detach()
        if isinstance(whole, Conv1D):  # GPT-2's linear layer, the other way round
            weight = weight.T
        self.outputs = weight.shape[0]
        self.bias = whole.bias
        self.weight: torch.Tensor
        self.scale: torch.Tensor | None
        narrow, scale = _in_int8(weight) if rounded else (None, None)
        if narrow is None:
            weight = weight.to(rounded)
            half = weight.to(torch.bfloat16)
            if weight.shape[1] % 2:  # the operator takes inputs of narrow weights in pairs
                narrow = weight.float()
            else:
                narrow = half if torch.equal(half.to(weight.dtype), weight) else weight
        self.register_buffer("weight", torch.ops.parlay.pack_weight(narrow), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., in] -> [..., out]."""
        return torch.ops.parlay.linear(hidden, self.weight, self.scale, self.bias, self.outputs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Another type or device is none of its business: weights were packed for the operator."""
        del fn, recurse
        return self


def _in_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Whole numbers [outputs, inputs] and scales [outputs], if a weight consists of such."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    whole = (weight / scale).round()
    exact = weight.shape[1] % 2 == 0 and ((whole * scale - weight).abs() <= ROUNDING * 127 * scale).all()
    return (whole.to(torch.int8), scale[:, 0].contiguous()) if exact else (None, None)


@torch.no_grad()
def pack_products(model: nn.Module, rounded: torch.dtype | None = None) -> None:
    """Replaces a model's linear layers, where the operators can be had and know their type.

    Args:
        model: On CPU, or nothing happens.
        rounded: See `PackedLinear`.
    """
    found = {
        (owner, name): layer
        for owner in model.modules()
        for name, layer in owner.named_children()
        if isinstance(layer, nn.Linear | Conv1D)
        and type(layer) in (nn.Linear, Conv1D)
        and can_pack(layer.weight)
        and (rounded or layer.weight.dtype) in DTYPES
    }
    if not found or not native.load():
        return
    shelf = Shelf()
    while found:  # one at a time, so that only one layer is in memory twice (and a head that is tied to the embedding)
        (owner, name), layer = found.popitem()
        packed = PackedLinear(layer, rounded)
        packed.weight = shelf.keep(packed.weight)
        setattr(owner, name, packed)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether the operator multiplies by such weights."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES
