"""Operations on tree shapes."""

from __future__ import annotations

from parlay.types import Tree


def overlap(tree: Tree, bound: Tree) -> list[int]:
    """Nodes of `tree` that have a counterpart in `bound`, matching the k-th child of a node with the k-th child.

    The result is ancestor-closed and in node order.
    """
    if tree.is_chain and bound.is_chain:
        return list(range(min(len(tree), len(bound))))
    children = bound.children()
    counterpart = {-1: -1}
    used: dict[int, int] = {}
    for node, parent in enumerate(tree.parents):
        if parent not in counterpart:
            continue
        rank = used.get(parent, 0)
        used[parent] = rank + 1
        options = children.get(counterpart[parent], [])
        if rank < len(options):
            counterpart[node] = options[rank]
    return [node for node in counterpart if node >= 0]


def subtree(tree: Tree, nodes: list[int]) -> Tree:
    """The shape of an ancestor-closed set of nodes, given in node order."""
    number = {-1: -1} | {node: i for i, node in enumerate(nodes)}
    return Tree(tuple(number[tree.parents[node]] for node in nodes))


def chains(count: int, depth: int) -> Tree:
    """Independent chains of equal depth, one after the other."""
    return Tree(tuple(node - 1 if node % depth else -1 for node in range(count * depth)))
