"""The attention function that transformers calls; the backends behind it have files of their own.

Every attention layer of a Hugging Face model calls the registered `parlay` function. What the step holds (pages, masks)
reaches it through a scoped context, because some architectures drop keyword arguments on the way to their layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from parlay.engine.kv import KVShape

NAME = "parlay"
_UNSUPPORTED = frozenset(("s_aux", "sinks", "position_bias", "alibi"))


class UnsupportedModel(ValueError):
    """The model cannot be served exactly; the message is a sentence that says why."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks for beside its tensors."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None


class StepAttention(Protocol):
    """Attends for one forward pass."""

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """query: [T, heads, D]; key, value: [T, kv_heads, D] -> [T, heads, D_value]."""
        ...


_step: ContextVar[StepAttention] = ContextVar("parlay_step")


@contextmanager
def forward_batch(step: StepAttention) -> Iterator[None]:
    """Makes `step` the one that attention layers in this scope work for."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> StepAttention:
    """The one that attention layers work for."""
    return _step.get()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, D]
    key: torch.Tensor,  # [1, kv_heads, T, D]
    value: torch.Tensor,  # [1, kv_heads, T, D_value]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    if not _UNSUPPORTED.isdisjoint(unused):
        for name in _UNSUPPORTED & unused.keys():
            if unused[name] is not None:
                raise UnsupportedModel(f"this model's attention uses {name!r}, which Parlay does not support yet")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModel(
            "this model's attention looks at later tokens too, so it does not generate text in order"
        )
    if attention_mask is not None:
        raise UnsupportedModel("this model builds its own attention mask, so packed trees would be masked wrongly")
    call = AttentionCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    out = _step.get()(call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return out.contiguous()[None], None  # as transformers' own functions return it; some models rely on it


AttentionInterface.register(NAME, _attend)


@dataclass(slots=True)
class ProbeAttention:
    """Learns what each layer keeps and asks for, from one pass that attends to nothing."""

    shapes: dict[int, KVShape]
    calls: dict[int, AttentionCall]

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if call.layer in self.shapes:
            raise UnsupportedModel("this model shares one KV cache entry between several attention calls")
        self.shapes[call.layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.calls[call.layer] = call
        return torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype, device=query.device)
