"""The one place where a step's host lists become tensors.

A step is packed: for every row its known tokens, then its tree's nodes. A known token at position p is stored in
slot(p). Tree node i is stored in slot(len(tokens) + i), a scratch place, and stands at position
len(tokens) - 1 + depth. It sees all known tokens, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from parlay.bets import NO_TREE, Tree
from parlay.types import Row, RowResult


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter bet on one row.

    Attributes:
        method: The drafter's name.
        tree: The shape; at most the planned one.
        tokens: One per node.
        probs: None for deterministic guesses. Otherwise the distribution each node's children were drawn from, in node
            order: one row per inner node, the root first, then by node number, [num_inner, vocab].
        replaced: Whether siblings were drawn with replacement (SpecInfer), not without (Sequoia).
        ahead: So many candidates for the next token are begun while the target runs this one; there is no tree then.
        ids: [vocab] the target's tokens that `probs` are of; None where they are all of them.
    """

    method: str
    tree: Tree
    tokens: tuple[int, ...]
    probs: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    replaced: bool = False
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row on the host: its known tokens of this pass, then nodes of its tree."""

    tokens: np.ndarray  # [q]
    positions: np.ndarray  # [q]
    slots: np.ndarray  # [q]
    pages: np.ndarray  # those of everything the row may look at: known tokens, then nodes
    end: int  # known tokens in KV after this pass
    tree: Tree
    first_node: int  # nodes before this one are in KV already; the others run
    skipped: int = 0  # positions of the text before the first page; all others are counted from there

    @property
    def count(self) -> int:
        """Known tokens of this pass."""
        return len(self.tokens) - len(self.tree) + self.first_node

    @property
    def span(self) -> int:
        """KV slots that the row may look at."""
        return self.end + len(self.tree)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """Everything one forward pass needs, packed over rows; attention backends add what they need.

    Attributes:
        rows: The rows on the host, in packed order.
        tokens: [T].
        positions: [T].
        slots: [T] where each token's KV is written.
        reads: [N] packed tokens whose logits somebody reads: per sampling row its last known token, then its nodes.
        first_read: Per row, where its logits begin in `reads`; -1 where it has none.
    """

    rows: tuple[PackedRow, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    reads: torch.Tensor
    first_read: tuple[int, ...]

    def to(self, device: torch.device) -> ForwardBatch:
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "slots", "reads")}
        return replace(self, **tensors)


def ancestors(tree: Tree) -> np.ndarray:
    """[n, n], True where the column is the row's ancestor or the row itself."""
    mask = np.eye(len(tree), dtype=bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def pack_row(
    known: Sequence[int],
    end: int,
    pages: Sequence[int],
    page_size: int,
    tree: Tree = NO_TREE,
    guesses: Sequence[int] = (),
    skipped: int = 0,
) -> PackedRow:
    """One row of a pass.

    Args:
        known: Tokens before position `end`, as many as run in this pass.
        end: Known tokens in KV after it.
        pages: The row's.
        page_size: Positions per page.
        tree: Behind the known tokens, those of its nodes that are in KV already included.
        guesses: Tokens of its last nodes, as many as run in this pass.
        skipped: Positions of the text before the first of these pages.
    """  # fmt: skip
    first_node = len(tree) - len(guesses)
    held = np.asarray(pages[: -(-(end + len(tree)) // page_size)], dtype=np.int64)
    before = np.arange(end - len(known), end)
    index = np.concatenate([before, np.arange(end + first_node, end + len(tree))])
    nodes = end - 1 + np.asarray(tree.depths[first_node:], dtype=np.int64)
    return PackedRow(
        tokens=np.asarray([*known, *guesses], dtype=np.int64),
        positions=np.concatenate([before, nodes]),
        slots=held[index // page_size] * page_size + index % page_size,
        pages=held,
        end=end,
        tree=tree,
        first_node=first_node,
        skipped=skipped,
    )


def pack(rows: Sequence[Row], drafts: Sequence[Draft | None], page_size: int, device: torch.device) -> ForwardBatch:
    """Packs the rows of a step, trees of any shape beside known tokens of any count.

    Read is every row that reaches its last known token: there, and at all nodes.
    """
    packed: list[PackedRow] = []
    for row, draft in zip(rows, drafts, strict=True):
        end = row.start + row.count
        tree, guesses = (draft.tree, draft.tokens) if draft else (NO_TREE, ())
        packed.append(pack_row(row.tokens[row.start : end], end, row.pages, page_size, tree, guesses))
    return join(packed, [row.samples for row in rows], device)


def join(rows: Sequence[PackedRow], read: Sequence[bool], device: torch.device) -> ForwardBatch:
    """Puts rows behind each other.

    Args:
        rows: Of one pass.
        read: Whose last known token in this pass and nodes in this pass somebody reads.
        device: Where the tensors go.
    """
    reads: list[int] = []
    first_read: list[int] = []
    start = 0
    for row, wanted in zip(rows, read, strict=True):
        first_read.append(len(reads) if wanted else -1)
        if wanted:
            reads.extend(range(start + max(0, row.count - 1), start + len(row.tokens)))
        start += len(row.tokens)

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows])).to(device)

    return ForwardBatch(
        rows=tuple(rows),
        tokens=joined("tokens"),
        positions=joined("positions"),
        slots=joined("slots"),
        reads=torch.tensor(reads, dtype=torch.long, device=device),
        first_read=tuple(first_read),
    )


def kept_places(rows: Sequence[Row], results: Sequence[RowResult], page_size: int) -> tuple[list[int], list[int]]:
    """What a step leaves in KV: lines of the packed step, and the slots where they are once guesses have moved."""
    lines: list[int] = []
    slots: list[int] = []
    at = 0
    for row, got in zip(rows, results, strict=True):
        end = row.start + row.count
        lines += [*range(at, at + row.count), *(at + row.count + node for node in got.accepted)]
        places = range(row.start, end + len(got.accepted))
        slots += [row.pages[place // page_size] * page_size + place % page_size for place in places]
        at += row.count + len(got.tree)
    return lines, slots


def kept_slots(row: Row, accepted: Sequence[int], page_size: int) -> Iterator[tuple[int, int]]:
    """Where accepted nodes' KV is, and where it belongs: position by position after the known tokens."""
    end = row.start + row.count

    def slot(index: int) -> int:
        return row.pages[index // page_size] * page_size + index % page_size

    for depth, node in enumerate(accepted):
        if node != depth:
            yield slot(end + node), slot(end + depth)
