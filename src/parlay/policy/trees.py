"""Trees of guesses as arrays: shapes, survival, expected length, best parts.

An acceptance vector p says how likely the k-th child of an accepted node is the one that is accepted (Sequoia, arXiv
2402.12374, Def. 3.1). Its entries exclude each other, so they sum to at most 1. As a matrix [depth, child] it may
change from level to level; the last row then holds for all deeper levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from parlay.bets import Tree

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


# ---- shapes ---------------------------------------------------------------------------------------------------------


def chains(count: int, depth: int) -> Tree:
    """Independent chains of equal depth, one after the other."""
    return Tree(tuple(node - 1 if node % depth else -1 for node in range(count * depth)))


def kary(branching: int, depth: int) -> Tree:
    """Every node down to `depth` has `branching` children; level by level."""
    return by_level([branching] * depth)


def by_level(branching: Sequence[int]) -> Tree:
    """Every node of level i has branching[i] children, as in SpecInfer's expansions (arXiv 2305.09781)."""
    parents: list[int] = []
    level = [-1]
    for count in branching:
        start = len(parents)
        parents += [node for node in level for _ in range(count)]
        level = list(range(start, len(parents)))
    return Tree(tuple(parents))


def from_children(children: Sequence[Sequence[int]]) -> Tree:
    """A tree from child lists; the first list is the root's, the list after it that of node 0, and so on.

    Raises:
        ValueError: where a node has no parent, two of them, or one that comes after it.
    """
    parents: dict[int, int] = {}
    for parent, nodes in enumerate(children, start=-1):
        for node in nodes:
            if node in parents:
                raise ValueError(f"node {node} is a child of {parents[node]} and of {parent}")
            parents[node] = parent
    if sorted(parents) != list(range(len(parents))):
        raise ValueError("nodes must be numbered from 0 without a gap, and each be somebody's child")
    return Tree(tuple(parents[node] for node in range(len(parents))))


def overlap(tree: Tree, bound: Tree) -> list[int]:
    """Nodes of `tree` that have a counterpart in `bound`, matching the k-th child of a node with the k-th child.

    The result is ancestor-closed and in node order.
    """
    if tree.is_chain and bound.is_chain:
        return list(range(min(len(tree), len(bound))))
    children = bound.children()
    counterpart = {-1: -1}
    for node, (parent, rank) in enumerate(zip(tree.parents, child_ranks(tree).tolist(), strict=True)):
        options = children.get(counterpart[parent], []) if parent in counterpart else []
        if rank < len(options):
            counterpart[node] = options[rank]
    return [node for node in counterpart if node >= 0]


def subtree(tree: Tree, nodes: Sequence[int]) -> Tree:
    """The shape of an ancestor-closed set of nodes, given in node order."""
    parents, number = tree.parents, {-1: -1} | {node: place for place, node in enumerate(nodes)}
    return _tree(tuple([number[parents[node]] for node in nodes]))


_tree = lru_cache(maxsize=4096)(Tree)  # the same few shapes come again and again


# ---- structure ------------------------------------------------------------------------------------------------------


def child_ranks(tree: Tree) -> Ints:
    """[n]: 0 for the first child of its parent, 1 for the second, in draw order."""
    seen: dict[int, int] = {}
    ranks = []
    for parent in tree.parents:
        ranks.append(seen.get(parent, 0))
        seen[parent] = ranks[-1] + 1
    return np.array(ranks, dtype=np.intp)


def levels(tree: Tree) -> list[Ints]:
    """Nodes by depth, that of the root's children first."""
    depths = np.array(tree.depths, dtype=np.intp)
    return [np.flatnonzero(depths == depth) for depth in range(1, tree.depth + 1)]


def ancestor_mask(tree: Tree) -> NDArray[np.bool_]:
    """[n, n]: whether column is row itself or one of its ancestors."""
    mask = np.eye(len(tree), dtype=bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


# ---- value ----------------------------------------------------------------------------------------------------------


def survival(tree: Tree, acceptance: Floats) -> Floats:
    """[n]: the probability that each node is accepted, the product of the acceptance along its path.

    Args:
        tree: The shape.
        acceptance: [children] or [depth, children]; children beyond it are never accepted.
    """
    matrix = np.atleast_2d(acceptance)
    depths, ranks = np.array(tree.depths, dtype=np.intp), child_ranks(tree)
    known = ranks < matrix.shape[1]
    value = np.where(known, matrix[np.minimum(depths, len(matrix)) - 1, np.where(known, ranks, 0)], 0.0)
    for nodes in levels(tree)[1:]:
        value[nodes] *= value[np.array(tree.parents, dtype=np.intp)[nodes]]
    return value


def expected_emitted(tree: Tree, acceptance: Floats) -> float:
    """F(T), tokens emitted in a step: one, and every node with its survival (Sequoia, Prop. 3.4)."""
    return 1.0 + float(survival(tree, acceptance).sum())


def best_part(tree: Tree, values: Floats, size: int) -> list[int]:
    """The ancestor-closed set of at most `size` nodes with the largest sum of values, in node order.

    Where no node is worth more than its parent, as survivals are, these are simply the nodes of the largest values.
    In general the nodes are looked at in depth-first order, where taking a node leads to the next one, and leaving it
    to the first one behind its descendants: O(n * size), one vector operation per node.

    Args:
        tree: The shape.
        values: [n], none of them negative.
        size: How many nodes may be taken.
    """
    size = min(size, len(tree))
    order, behind = _depth_first(tree)
    best = np.zeros((len(tree) + 1, size + 1))  # of the nodes from here on, by how many may be taken
    for place in range(len(tree) - 1, -1, -1):
        left = best[behind[place]]
        best[place] = left
        np.maximum(left[1:], values[order[place]] + best[place + 1, :-1], out=best[place, 1:])
    taken: list[int] = []
    place, room = 0, size
    while place < len(tree) and room > 0:
        if best[place, room] > best[behind[place], room]:
            taken.append(order[place])
            place, room = place + 1, room - 1
        else:
            place = behind[place]
    return sorted(taken)


def _depth_first(tree: Tree) -> tuple[list[int], list[int]]:
    """Nodes in depth-first order, and for each place the place behind the node's last descendant."""
    sizes = [1] * len(tree)
    for node in range(len(tree) - 1, -1, -1):
        if tree.parents[node] >= 0:
            sizes[tree.parents[node]] += sizes[node]
    places: list[int] = []
    free = {-1: 0}  # where a node's next child goes
    for node, parent in enumerate(tree.parents):
        places.append(free[parent])
        free[parent] += sizes[node]
        free[node] = places[node] + 1
    order = sorted(range(len(tree)), key=places.__getitem__)
    return order, [place + sizes[node] for place, node in enumerate(order)]
