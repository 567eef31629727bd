"""Attention by PyTorch's own operators, for every device and type: rows are gathered into padded rectangles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from parlay.engine.attention import AttentionCall
from parlay.engine.batch import ForwardBatch, PackedRow, ancestors
from parlay.engine.blocks import NULL_PAGE
from parlay.engine.kv import PagedKV

GROUP_COST = 512  # padded KV slots that take about as long as one more group


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Rows with similar query counts, padded to a rectangle.

    Attributes:
        queries: [R * Q] packed tokens; padding repeats a row's last one.
        pages: [R * P] KV pages in row order, of P * page size = S positions; padding is the null page.
        query_positions: [R, Q].
        key_positions: [R, S].
        visible: [R, Q, S], True where the query may look.
    """

    queries: torch.Tensor | slice
    pages: torch.Tensor | slice
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    visible: torch.Tensor
    _gathered: dict[torch.Size, torch.Tensor] = field(default_factory=dict, init=False)
    _masks: dict[tuple[int | None, torch.dtype, int], torch.Tensor] = field(default_factory=dict, init=False)

    def gather(self, pool: torch.Tensor) -> torch.Tensor:
        """[R, S, heads, D] of a layer's pool [pages, page size, heads, D], in memory that the next layer uses again."""
        (rows, _, span), shape = self.visible.shape, pool.shape[1:]
        if isinstance(self.pages, slice):
            return pool[self.pages].view(rows, span, *shape[1:])
        if shape not in self._gathered:
            self._gathered[shape] = pool.new_empty(len(self.pages), *shape)
        return torch.index_select(pool, 0, self.pages, out=self._gathered[shape]).view(rows, span, *shape[1:])

    def mask(self, window: int | None, dtype: torch.dtype, folds: int) -> torch.Tensor:
        """Additive mask [R, 1, folds * Q, S], the query block repeated once per query head of a KV head.

        A window of w lets a query at position p see positions above p - w, as transformers counts.
        """
        key = (window, dtype, folds)
        if key not in self._masks:
            visible = self.visible
            if window is not None:
                distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
                visible = visible & (distance < window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask.masked_fill_(~visible, float("-inf"))
            self._masks[key] = mask.repeat(1, folds, 1)[:, None]
        return self._masks[key]


def _key_positions(row: PackedRow) -> np.ndarray:
    """[s]."""
    return np.concatenate([np.arange(row.end), row.end - 1 + np.asarray(row.tree.depths, dtype=np.int64)])


def _visible(row: PackedRow) -> np.ndarray:
    """[q, s], True where the query may look."""
    keys = np.arange(row.span)
    keys[row.end :] = row.span  # a position that nobody reaches
    visible = keys[None, :] <= row.positions[:, None]
    if row.tree:
        visible[row.count :, row.end :] = ancestors(row.tree)[row.first_node :]
    return visible


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _group(
    rows: Sequence[PackedRow], members: Sequence[int], starts: Sequence[int], page_size: int, device: torch.device
) -> AttentionGroup:
    width = max(len(rows[i].tokens) for i in members)
    pages = np.full((len(members), max(len(rows[i].pages) for i in members)), NULL_PAGE, dtype=np.int64)
    span = pages.shape[1] * page_size
    queries = np.zeros((len(members), width), dtype=np.int64)
    query_positions = np.zeros((len(members), width), dtype=np.int64)
    key_positions = np.zeros((len(members), span), dtype=np.int64)
    visible = np.zeros((len(members), width, span), dtype=bool)
    for line, i in enumerate(members):
        row, q, s = rows[i], len(rows[i].tokens), rows[i].span
        queries[line] = starts[i] + np.minimum(np.arange(width), q - 1)
        query_positions[line, :q], query_positions[line, q:] = row.positions, row.positions[-1]
        pages[line, : len(row.pages)] = row.pages
        key_positions[line, :s] = _key_positions(row)
        sees = _visible(row)
        visible[line, :q, :s], visible[line, q:, :s] = sees, sees[-1]
    arrays = (query_positions, key_positions, visible)
    return AttentionGroup(
        _indices(queries, device), _indices(pages, device), *(torch.from_numpy(array).to(device) for array in arrays)
    )


def _indices(array: np.ndarray, device: torch.device) -> torch.Tensor | slice:
    """Flattened; a slice where they follow each other, which saves a copy in every layer."""
    flat = array.ravel()
    if (np.diff(flat) == 1).all():
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat).to(device)


def _cut_by_context(members: list[int], rows: Sequence[PackedRow]) -> Iterator[list[int]]:
    """Cuts a bucket from its longest context down wherever that saves enough padding to pay for another group."""
    left = sorted(members, key=lambda i: -rows[i].span)
    if (rows[left[0]].span - rows[left[-1]].span) * len(left) <= GROUP_COST:
        yield members  # in packed order, which may save a copy
        return
    while left:
        spans = [rows[i].span for i in left]
        cut = next((n for n, span in enumerate(spans) if (spans[0] - span) * (len(left) - n) > GROUP_COST), len(left))
        yield left[:cut]
        left = left[cut:]


def rectangles(batch: ForwardBatch, page_size: int) -> tuple[tuple[AttentionGroup, ...], torch.Tensor | None]:
    """Buckets rows by query count, to powers of two, and by context.

    Returns:
        The rectangles, and [T] the position of each token in their concatenation; None when it is the identity.
    """
    rows, device = batch.rows, batch.tokens.device
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)]).tolist()
    buckets: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        buckets.setdefault(_power_of_two(len(row.tokens)), []).append(i)
    groups, offset = [], 0
    unpack = np.empty(starts[-1], dtype=np.int64)
    for members in (part for bucket in buckets.values() for part in _cut_by_context(bucket, rows)):
        group = _group(rows, members, starts, page_size, device)
        groups.append(group)
        for i in members:
            q = len(rows[i].tokens)
            unpack[starts[i] : starts[i] + q] = np.arange(offset, offset + q)
            offset += group.visible.shape[1]
    identity = offset == len(unpack) and bool((unpack == np.arange(offset)).all())
    return tuple(groups), None if identity else torch.from_numpy(unpack).to(device)


class GatheredAttention:
    """Gathers each row's KV into a rectangle and attends under a mask.

    Args:
        kv: The pools.
        batch: The step.
    """

    def __init__(self, kv: PagedKV, batch: ForwardBatch) -> None:
        self.kv, self.slots = kv, batch.slots
        self.groups, self.unpack = rectangles(batch, kv.page_size)

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.kv.write(call.layer, self.slots, key, value)
        outputs = [self._group(call, query, group) for group in self.groups]
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed if self.unpack is None else packed.index_select(0, self.unpack)

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
