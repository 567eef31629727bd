"""Sequoia's optimal trees (Chen et al. 2024, arXiv 2402.12374): which shape emits most for its size and depth.

The paper counts the root as a node and as a level; here, as everywhere in Parlay, size and depth count guesses, so the
paper's tree of n nodes and d levels is one of size n - 1 and depth d - 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from parlay.bets import Tree
from parlay.policy.trees import Floats, Ints

Shape: TypeAlias = "list[Shape]"  # a node's children, each the list of its own


class OptimalTrees:
    """The best trees of every size up to a limit, by depth.

    The recurrence is that of Algorithm 4. A node of a given level that may use its first b children is worth
    `T[n, b] = max over m of T[n - m, b - 1] + p[level, b] * best[m]` with n nodes below and including it, where `best`
    belongs to the next level and m is what the b-th child gets. One pass costs O(size^2 * depth * children), vectorised
    over n and m.

    Args:
        acceptance: [children] or [depth, children], see `parlay.policy.trees`.
        size: Most guesses.
        depth: Most levels of guesses.

    Attributes:
        emitted: [depth + 1, size + 1] tokens that a step emits with the best tree of at most so many levels and nodes.
    """

    def __init__(self, acceptance: Floats, size: int, depth: int) -> None:
        matrix = np.atleast_2d(np.asarray(acceptance, dtype=np.float64))
        if size < 0 or depth < 0:
            raise ValueError("size and depth must not be negative")
        if not (np.isfinite(matrix).all() and (matrix >= 0).all() and (matrix.sum(axis=1) <= 1 + 1e-9).all()):
            raise ValueError("acceptance: must be probabilities that sum to at most 1 in every row")
        self.acceptance, self.size, self.depth = matrix, size, depth
        self._same = len(matrix) == 1  # every level is like the first: one pass serves all depths
        self._passes: dict[int, _Pass] = {}
        limits = range(depth + 1)
        self.emitted = np.stack([np.maximum.accumulate(self._solve(limit)[0]) for limit in limits])

    def _solve(self, limit: int) -> tuple[Floats, int]:
        """What the root is worth by size when `limit` levels may follow, and the level that holds its solution."""
        pass_ = self._pass(limit)
        level = self.depth - limit if self._same else 0
        return pass_.worth[level], level

    def _pass(self, limit: int) -> _Pass:
        key = self.depth if self._same else limit
        if key not in self._passes:
            rows = self.acceptance[np.minimum(np.arange(key), len(self.acceptance) - 1)]
            self._passes[key] = _Pass(rows, self.size)
        return self._passes[key]

    def tree(self, size: int, depth: int) -> Tree:
        """The best tree of at most so many guesses and levels.

        Nodes come in the order of their survival, each behind its parent and its elder siblings: cut off anywhere, what
        is left is again ancestor-closed, and, for acceptances that fall from child to child, the best of its size.
        """
        depth, size = min(depth, self.depth), min(size, self.size)
        worth, level = self._solve(depth)
        exact = int(np.argmax(worth[: size + 1]))
        children = self._pass(depth).children(level, exact)
        return self._ordered(children)

    def _ordered(self, root: Shape) -> Tree:
        parents: list[int] = []
        waiting: list[tuple[float, int, int, int, int, Shape]] = []  # by survival; ties as they were found
        found = 0

        def offer(survival: float, parent: int, depth: int, rank: int, siblings: Shape) -> None:
            nonlocal found
            if rank < len(siblings):
                row = self.acceptance[min(depth, len(self.acceptance) - 1)]
                heapq.heappush(waiting, (-survival * row[rank], found, parent, depth, rank, siblings))
                found += 1

        above: dict[int, float] = {-1: 1.0}
        offer(1.0, -1, 0, 0, root)
        while waiting:
            negative, _, parent, depth, rank, siblings = heapq.heappop(waiting)
            node = len(parents)
            parents.append(parent)
            above[node] = -negative
            offer(above[parent], parent, depth, rank + 1, siblings)
            offer(above[node], node, depth + 1, 0, siblings[rank])
        return Tree(tuple(parents))


class _Pass:
    """The recurrence for one limit of depth; level 0 is the root's, whose children are the first guesses.

    Args:
        rows: [levels, children] acceptance of the children of each level's nodes.
        size: Most nodes below the root.
    """

    def __init__(self, rows: Floats, size: int) -> None:
        levels, self.branches = rows.shape
        self.worth = np.full((levels + 1, size + 1), -np.inf)  # by nodes below
        self.worth[:, 0] = 1.0
        self._share = np.zeros((levels, self.branches, size + 1), dtype=np.int16)  # what the last child got
        self._used = np.zeros((levels, size + 1), dtype=np.int16)  # children used
        places = np.arange(size + 1)
        gap = places[:, None] - places[None, :]  # nodes left for the elder children, [n, m]; m is the last child's own
        legal = (gap >= 0) & (places[None, :] >= 1)
        gap = np.where(legal, gap, 0)
        for level in range(levels - 1, -1, -1):
            below = np.concatenate(([-np.inf], self.worth[level + 1, :-1]))  # a child of m nodes has m - 1 below it
            elder = np.full(size + 1, -np.inf)
            elder[0] = 1.0
            for branch in range(self.branches):
                p = rows[level, branch]
                gained = np.multiply(p, below, out=np.full(size + 1, -np.inf), where=below > -np.inf)
                total = np.where(legal, elder[gap] + gained[None, :], -np.inf)
                self._share[level, branch] = np.argmax(total, axis=1)
                elder = total[places, self._share[level, branch]]
                better = elder > self.worth[level]
                self.worth[level] = np.where(better, elder, self.worth[level])
                self._used[level] = np.where(better, branch + 1, self._used[level])

    def children(self, level: int, nodes: int) -> Shape:
        """How so many nodes below a node of this level hang together."""
        found: Shape = []
        if nodes == 0:
            return found
        for branch in range(int(self._used[level, nodes]) - 1, -1, -1):
            share = int(self._share[level, branch, nodes])
            found.append(self.children(level + 1, share - 1))
            nodes -= share
        return found[::-1]


@dataclass(frozen=True, slots=True)
class Choice:
    """The best tree for measured costs: its size and depth in guesses, what it emits, and how much it speeds up."""

    size: int
    depth: int
    emitted: float
    speedup: float


def best_for_hardware(
    trees: OptimalTrees, verify: Callable[[Ints], Floats], level_cost: float, sizes: Ints | None = None
) -> Choice:
    """The size and depth with the largest speed-up over plain decoding (Sequoia, Section 4.3).

    The speed-up is G(n, d) / (t(n) + d c): a draft model runs once per level and once more for the last token. No guess
    at all (speed-up 1) is a candidate too, and costs no draft.

    Args:
        trees: The best trees.
        verify: Time of a pass over a row's token and so many guesses, over that of its token alone.
        level_cost: c, time of one pass of the draft model over the same.
        sizes: The sizes to look at; all of them by default.
    """
    sizes = np.arange(1, trees.size + 1) if sizes is None else sizes
    depths = np.arange(1, trees.depth + 1)
    if not (sizes.size and depths.size):
        return Choice(0, 0, 1.0, 1.0)
    speedup = trees.emitted[np.ix_(depths, sizes)] / (verify(sizes)[None, :] + (depths[:, None] + 1) * level_cost)
    row, column = np.unravel_index(np.argmax(speedup), speedup.shape)
    if speedup[row, column] <= 1:
        return Choice(0, 0, 1.0, 1.0)
    depth, size = int(depths[row]), int(sizes[column])
    return Choice(size, depth, float(trees.emitted[depth, size]), float(speedup[row, column]))
