"""The one place where a step's host lists become tensors.

A step is packed: for every row its known tokens, then its tree's nodes. A known token at position p is stored in
slot(p). Tree node i is stored in slot(len(tokens) + i), a scratch place, and stands at position
len(tokens) - 1 + depth. It sees all known tokens, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from parlay.engine.blocks import NULL_PAGE
from parlay.types import Row, Tree

NO_TREE = Tree(())
GROUP_COST = 512  # padded KV slots that take about as long as one more group


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter bet on one row.

    Attributes:
        method: The drafter's name.
        tree: The shape; at most the planned one.
        tokens: One per node.
        probs: None for deterministic guesses. Otherwise the distribution each node's children were drawn from,
            without replacement and in node order: one row per inner node, the root first, then by node number,
            [num_inner, vocab].
    """

    method: str
    tree: Tree
    tokens: tuple[int, ...]
    probs: torch.Tensor | None = None


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


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """Everything one forward pass needs, packed over rows.

    Attributes:
        tokens: [T].
        positions: [T].
        slots: [T] where each token's KV is written.
        groups: The attention rectangles.
        unpack: [T] position of each token in the concatenated, flattened groups; None when it is the identity.
        reads: [N] packed tokens whose logits somebody reads: per sampling row its last known token, then its nodes.
        first_read: Per row, where its logits begin in `reads`; -1 where it has none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    unpack: torch.Tensor | None
    reads: torch.Tensor
    first_read: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _PackedRow:
    """One row on the host."""

    tokens: np.ndarray  # [q]
    positions: np.ndarray  # [q]
    slots: np.ndarray  # [q]
    pages: np.ndarray  # those of everything the row may look at: known tokens, then nodes
    context_positions: np.ndarray  # [s]
    visible: np.ndarray  # [q, s]

    @property
    def span(self) -> int:
        return len(self.context_positions)


def ancestors(tree: Tree) -> np.ndarray:
    """[n, n], True where the column is the row's ancestor or the row itself."""
    mask = np.eye(len(tree), dtype=bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def _pack_row(row: Row, draft: Draft | None, page_size: int) -> _PackedRow:
    tree = draft.tree if draft else NO_TREE
    end = row.start + row.count
    pages = np.asarray(row.pages[: -(-(end + len(tree)) // page_size)], dtype=np.int64)
    index = np.arange(row.start, end + len(tree))
    known = np.arange(end)
    nodes = end - 1 + np.asarray(tree.depths, dtype=np.int64)
    positions = np.concatenate([known[row.start :], nodes])
    visible = np.concatenate([known, np.full(len(tree), end + len(tree))])[None, :] <= positions[:, None]
    if tree:
        visible[row.count :, end:] = ancestors(tree)
    return _PackedRow(
        tokens=np.asarray([*row.tokens[row.start : end], *(draft.tokens if draft else ())], dtype=np.int64),
        positions=positions,
        slots=pages[index // page_size] * page_size + index % page_size,
        pages=pages,
        context_positions=np.concatenate([known, nodes]),
        visible=visible,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _group(
    rows: Sequence[_PackedRow], members: Sequence[int], starts: Sequence[int], page_size: int, device: torch.device
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
        key_positions[line, :s] = row.context_positions
        visible[line, :q, :s], visible[line, q:, :s] = row.visible, row.visible[-1]
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


def _cut_by_context(members: list[int], rows: Sequence[_PackedRow]) -> Iterator[list[int]]:
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


def _groups(
    rows: Sequence[_PackedRow], starts: Sequence[int], page_size: int, device: torch.device
) -> tuple[tuple[AttentionGroup, ...], torch.Tensor | None]:
    """Buckets rows by query count, to powers of two, and by context, and says where each token ends up."""
    buckets: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        buckets.setdefault(_power_of_two(len(row.tokens)), []).append(i)
    groups, offset = [], 0
    unpack = np.empty(sum(len(row.tokens) for row in rows), dtype=np.int64)
    for members in (part for bucket in buckets.values() for part in _cut_by_context(bucket, rows)):
        group = _group(rows, members, starts, page_size, device)
        groups.append(group)
        for i in members:
            q = len(rows[i].tokens)
            unpack[starts[i] : starts[i] + q] = np.arange(offset, offset + q)
            offset += group.visible.shape[1]
    identity = offset == len(unpack) and bool((unpack == np.arange(offset)).all())
    return tuple(groups), None if identity else torch.from_numpy(unpack).to(device)


def pack(rows: Sequence[Row], drafts: Sequence[Draft | None], page_size: int, device: torch.device) -> ForwardBatch:
    """Packs the rows of a step, trees of any shape beside known tokens of any count."""
    packed = [_pack_row(row, draft, page_size) for row, draft in zip(rows, drafts, strict=True)]
    starts = np.cumsum([0, *(len(row.tokens) for row in packed)]).tolist()
    reads: list[int] = []
    first_read: list[int] = []
    for i, row in enumerate(rows):
        first_read.append(len(reads) if row.samples else -1)
        if row.samples:
            reads.extend(range(starts[i] + row.count - 1, starts[i + 1]))
    groups, unpack = _groups(packed, starts, page_size, device)

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in packed])).to(device)

    return ForwardBatch(
        tokens=joined("tokens"),
        positions=joined("positions"),
        slots=joined("slots"),
        groups=groups,
        unpack=unpack,
        reads=torch.tensor(reads, dtype=torch.long, device=device),
        first_read=tuple(first_read),
    )


def kept_slots(row: Row, accepted: Sequence[int], page_size: int) -> Iterator[tuple[int, int]]:
    """Where accepted nodes' KV is, and where it belongs: position by position after the known tokens."""
    end = row.start + row.count

    def slot(index: int) -> int:
        return row.pages[index // page_size] * page_size + index % page_size

    for depth, node in enumerate(accepted):
        if node != depth:
            yield slot(end + node), slot(end + depth)
