"""Strict parity: every reduction has the same shape and order whatever else is in the step.

The step runs in tiles of exactly TILE tokens, so every matrix product of the model has one shape. A token attends
to its own list of slots, in the order of positions, in chunks of exactly CHUNK keys that are combined from left to
right; a chunk that it may not see changes nothing, to the last bit. What a token computes then depends on its path
alone, not on its neighbours, on chunked prefill or on whether it was guessed.

On CPU an element-wise operation is cut between threads wherever that falls, and the elements beside a cut are computed
by other code (scalar, not vector) than the rest. So only matrix products keep their threads here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from parlay.engine.attention import AttentionCall
from parlay.engine.batch import Draft, ancestors
from parlay.engine.kv import PagedKV
from parlay.types import Row

TILE = 16
CHUNK = 128


class ParallelProducts:
    """A scope in which CPU work runs on one thread, except a model's matrix products.

    Attributes:
        threads: How many the products use; None means those that PyTorch would use outside of the scope.
    """

    def __init__(self, model: nn.Module) -> None:
        self.threads: int | None = None
        self._outside = 1
        for module in model.modules():
            weight = getattr(module, "weight", None)
            is_product = isinstance(weight, torch.Tensor) and weight.ndim >= 2 and not isinstance(module, nn.Embedding)
            if is_product:
                module.register_forward_pre_hook(self._before_product)
                module.register_forward_hook(self._after_product)

    def __enter__(self) -> None:
        self._outside = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._outside)

    def _before_product(self, *_: Any) -> None:
        torch.set_num_threads(self.threads or self._outside)

    def _after_product(self, *_: Any) -> None:
        torch.set_num_threads(1)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """TILE packed tokens, padded with tokens that live in the null page.

    Attributes:
        tokens: [TILE].
        positions: [TILE].
        slots: [TILE] where each token's KV is written.
        context: [TILE, S] slots of a token's own path by position, S a multiple of CHUNK.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    context: torch.Tensor

    def to(self, device: torch.device) -> Tile:
        """The same on another device."""
        return Tile(*(tensor.to(device) for tensor in (self.tokens, self.positions, self.slots, self.context)))


def tiles(rows: Sequence[Row], drafts: Sequence[Draft | None], page_size: int, device: torch.device) -> Iterator[Tile]:
    """Cuts a step into tiles, in packed order, so that a token's path is always written before or with it."""
    entries = [entry for row, draft in zip(rows, drafts, strict=True) for entry in _paths(row, draft, page_size)]
    for first in range(0, len(entries), TILE):
        chosen = entries[first : first + TILE]
        span = -(-max(len(path) for _, path in chosen) // CHUNK) * CHUNK
        tokens, context = np.zeros(TILE, dtype=np.int64), np.zeros((TILE, span), dtype=np.int64)
        positions, slots = np.zeros(TILE, dtype=np.int64), np.zeros(TILE, dtype=np.int64)
        for line, (token, path) in enumerate(chosen):
            tokens[line], positions[line], slots[line] = token, len(path) - 1, path[-1]
            context[line, : len(path)] = path
        yield Tile(*(torch.from_numpy(array).to(device) for array in (tokens, positions, slots, context)))


def _paths(row: Row, draft: Draft | None, page_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Every token of a row in packed order, with the slots of its path, its own last."""
    end, nodes = row.start + row.count, len(draft.tree) if draft else 0
    index = np.arange(end + nodes)
    slots = np.asarray(row.pages, dtype=np.int64)[index // page_size] * page_size + index % page_size
    for position in range(row.start, end):
        yield row.tokens[position], slots[: position + 1]
    if draft:
        for token, line in zip(draft.tokens, ancestors(draft.tree), strict=True):
            yield token, np.concatenate([slots[:end], slots[end:][line]])


@dataclass(frozen=True, slots=True)
class StrictAttention:
    """Attends for one tile in float32 or better, with an online softmax over chunks in the order of positions."""

    kv: PagedKV
    tile: Tile

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.kv.write(call.layer, self.tile.slots, key, value)
        accurate = torch.promote_types(query.dtype, torch.float32)
        heads, kv_heads = query.shape[1], key.shape[1]
        queries = query.reshape(TILE, kv_heads, heads // kv_heads, -1).to(accurate) * call.scale
        peak = torch.full((*queries.shape[:3], 1), float("-inf"), dtype=accurate, device=query.device)
        mass = torch.zeros_like(peak)
        total = queries.new_zeros(*queries.shape[:3], value.shape[-1])
        for first in range(0, self.tile.context.shape[1], CHUNK):
            slots = self.tile.context[:, first : first + CHUNK]
            scores = queries @ self.kv.keys[call.layer][slots].to(accurate).permute(0, 2, 3, 1)  # [T, kv, folds, C]
            if call.softcap is not None:
                scores = torch.tanh(scores / call.softcap) * call.softcap
            scores = scores.masked_fill(~self._visible(first, call.window)[:, None, None], float("-inf"))
            higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
            base = higher.clamp(min=torch.finfo(accurate).min)  # a chunk nobody sees must not make inf - inf
            shrink, weights = (peak - base).exp(), (scores - base).exp()
            mass = mass * shrink + weights.sum(-1, keepdim=True)
            total = total * shrink + weights @ self.kv.values[call.layer][slots].to(accurate).transpose(1, 2)
            peak = higher
        return (total / mass).reshape(TILE, heads, -1).to(query.dtype)

    def _visible(self, first: int, window: int | None) -> torch.Tensor:
        """[TILE, CHUNK], True where a key position is in the token's past and window."""
        positions = self.tile.positions[:, None]
        keys = torch.arange(first, first + CHUNK, device=positions.device)[None, :]
        visible = keys <= positions
        return visible if window is None else visible & (keys > positions - window)
