"""The attention function that transformers calls, and the backends behind it.

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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from parlay.engine.batch import AttentionGroup, ForwardBatch
from parlay.engine.kv import KVShape, PagedKV

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
    windows: dict[int, int | None]

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if call.layer in self.shapes:
            raise UnsupportedModel("this model shares one KV cache entry between several attention calls")
        self.shapes[call.layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.windows[call.layer] = call.window
        return torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype, device=query.device)


@dataclass(frozen=True, slots=True)
class GatheredAttention:
    """Reference backend for every device: gathers each row's KV into a rectangle and attends under a mask."""

    kv: PagedKV
    batch: ForwardBatch

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.kv.write(call.layer, self.batch.slots, key, value)
        outputs = [self._group(call, query, group) for group in self.batch.groups]
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed if self.batch.unpack is None else packed.index_select(0, self.batch.unpack)

    def _group(self, call: AttentionCall, query: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
        """Attends one rectangle. Query heads that share a KV head become extra queries, so KV is never repeated."""
        rows, width = group.visible.shape[:2]
        pool = self.kv.pools[call.layer]
        kv_heads, folds = pool.shape[2], query.shape[1] // pool.shape[2]
        context = group.gather(pool).transpose(1, 2)
        keys, values = context[..., : query.shape[2]], context[..., query.shape[2] :]  # [R, kv_heads, S, D]
        some = query[group.queries] if isinstance(group.queries, slice) else query.index_select(0, group.queries)
        if width > 1:
            some = some.reshape(rows, width, kv_heads, folds, -1).permute(0, 2, 3, 1, 4)
        queries = some.reshape(rows, kv_heads, folds * width, -1)
        mask = group.mask(call.window, query.dtype, folds)
        if call.softcap is None:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=call.scale)
        else:
            out = softcapped_attention(queries, keys, values, mask, call.scale, call.softcap)
        if width > 1:
            out = out.view(rows, kv_heads, folds, width, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * width, query.shape[1], -1)


def softcapped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores are squashed to softcap * tanh(score / softcap), as Gemma 2 does."""
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap + mask
    accurate = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=accurate).to(query.dtype) @ value
