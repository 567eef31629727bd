"""Attention by the C++ operator: every token walks its own path, known tokens first, then guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from parlay.engine.attention import AttentionCall
from parlay.engine.batch import ForwardBatch, PackedRow
from parlay.engine.blocks import NULL_PAGE
from parlay.engine.kv import PagedKV

DTYPES = frozenset((torch.float32, torch.bfloat16))


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """Every token's path through the KV slots, in the order of positions.

    Attributes:
        slots: [T] where each token's KV is written.
        pages: [R, P] page tables; padding is the null page.
        row: [T].
        known: [T] so many known tokens, through the row's page table, come first.
        ancestors: [T, A] then these slots, the token's own last; padding is -1.
    """

    slots: torch.Tensor
    pages: torch.Tensor
    row: torch.Tensor
    known: torch.Tensor
    ancestors: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.slots, self.pages, self.row, self.known, self.ancestors]

    @classmethod
    def of(cls, batch: ForwardBatch, page_size: int) -> Self:
        rows = batch.rows
        pages = np.full((len(rows), max(len(row.pages) for row in rows)), NULL_PAGE, dtype=np.int64)
        for line, row in enumerate(rows):
            pages[line, : len(row.pages)] = row.pages
        count = sum(len(row.tokens) for row in rows)
        ancestors = np.full((count, max(row.tree.depth for row in rows)), -1, dtype=np.int64)
        start = 0
        for row in rows:
            _fill_ancestors(ancestors[start + row.count :], row, page_size)
            start += len(row.tokens)
        return cls(
            batch.slots,
            torch.from_numpy(pages),
            torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.tokens) for row in rows])),
            torch.from_numpy(np.concatenate([np.minimum(row.positions + 1, row.end) for row in rows])),
            torch.from_numpy(ancestors),
        )


def _fill_ancestors(lines: np.ndarray, row: PackedRow, page_size: int) -> None:
    """Writes the paths of a row's nodes that run to the first of these lines."""
    place = np.arange(row.end, row.span)
    slots = row.pages[place // page_size] * page_size + place % page_size
    paths = np.full((len(row.tree), lines.shape[1]), -1, dtype=np.int64)
    for node, (parent, depth) in enumerate(zip(row.tree.parents, row.tree.depths, strict=True)):
        if parent >= 0:
            paths[node, : depth - 1] = paths[parent, : depth - 1]
        paths[node, depth - 1] = slots[node]
    lines[: len(paths) - row.first_node] = paths[row.first_node :]


class PathAttention:
    """Attends in float32, token by token in the same order whatever else is in the step.

    Args:
        kv: The pools.
        batch: The step.
    """

    def __init__(self, kv: PagedKV, batch: ForwardBatch) -> None:
        self.kv, self.paths = kv, Paths.of(batch, kv.page_size)

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return attend(call, query, key, value, self.kv.pools[call.layer], self.paths.tensors)


def attend(
    call: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    paths: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The operator: query [T, heads, D], key and value [T, kv_heads, D] -> [T, heads, D_value]; writes to the pool."""
    return torch.ops.parlay.attend(query, key, value, pool, *paths, call.scale, call.window or 0, call.softcap or 0.0)
