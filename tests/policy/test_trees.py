from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from parlay.bets import Tree
from parlay.policy import trees


@st.composite
def tree_shapes(draw: st.DrawFn, most: int = 9) -> Tree:
    size = draw(st.integers(0, most))
    return Tree(tuple(draw(st.integers(-1, node - 1)) for node in range(size)))


def closed_sets(tree: Tree) -> list[tuple[int, ...]]:
    """Every ancestor-closed set of nodes."""
    return [
        nodes
        for size in range(len(tree) + 1)
        for nodes in itertools.combinations(range(len(tree)), size)
        if all(tree.parents[node] in (-1, *nodes) for node in nodes)
    ]


def test_shapes() -> None:
    assert trees.chains(2, 3).parents == (-1, 0, 1, -1, 3, 4)
    assert trees.kary(2, 2).parents == (-1, -1, 0, 0, 1, 1)
    assert trees.by_level([2, 1]).parents == (-1, -1, 0, 1)
    assert trees.kary(1, 4) == Tree.chain(4)
    assert trees.kary(3, 0) == trees.by_level([]) == Tree(())


@given(tree_shapes())
def test_child_lists_and_parents_say_the_same(tree: Tree) -> None:
    children = tree.children()
    assert trees.from_children([children.get(node, []) for node in range(-1, len(tree))]) == tree


@pytest.mark.parametrize("children", [[[0], [0]], [[1]], [[0, 2]], [[1], [], [0]]])
def test_child_lists_that_are_no_tree(children: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="node"):
        trees.from_children(children)


@given(tree_shapes())
def test_levels_masks_and_ranks_agree_with_the_parents(tree: Tree) -> None:
    for depth, nodes in enumerate(trees.levels(tree), start=1):
        assert [tree.depths[node] for node in nodes] == [depth] * len(nodes)
    assert sum(map(len, trees.levels(tree))) == len(tree)
    mask = trees.ancestor_mask(tree)
    ranks = trees.child_ranks(tree)
    for node, parent in enumerate(tree.parents):
        path = {node}
        while (above := tree.parents[min(path)]) >= 0:
            path.add(above)
        assert set(np.flatnonzero(mask[node])) == path
        assert tree.children()[parent][ranks[node]] == node


@given(tree_shapes(), npst.arrays(float, (3, 4), elements=st.floats(0, 0.25)))
def test_survival_is_the_product_along_the_path(tree: Tree, acceptance: trees.Floats) -> None:
    mask, ranks = trees.ancestor_mask(tree), trees.child_ranks(tree)
    survival = trees.survival(tree, acceptance)
    for node in range(len(tree)):
        product = 1.0
        for ancestor in np.flatnonzero(mask[node]):
            rank, depth = ranks[ancestor], tree.depths[ancestor]
            product *= acceptance[min(depth, 3) - 1, rank] if rank < 4 else 0.0
        assert survival[node] == pytest.approx(product, abs=1e-15)
    assert trees.expected_emitted(tree, acceptance) == pytest.approx(1 + survival.sum())


def test_emitted_tokens_of_a_chain_follow_the_geometric_sum() -> None:
    a = 0.7
    assert trees.expected_emitted(Tree.chain(5), np.array([a])) == pytest.approx((1 - a**6) / (1 - a))


def test_emitted_tokens_are_those_of_drawn_walks() -> None:
    """F(T) against a simulation of the assumption behind it."""
    rng = np.random.default_rng(0)
    p, tree = np.array([0.5, 0.2, 0.1]), trees.by_level([3, 2, 1])
    children, total, runs = tree.children(), 0, 40_000
    for _ in range(runs):
        node = -1
        total += 1
        while node in children:
            rank = int(rng.choice(4, p=[*p, 1 - p.sum()]))
            if rank >= len(children[node]):
                break
            node = children[node][rank]
            total += 1
    assert total / runs == pytest.approx(trees.expected_emitted(tree, p), abs=0.02)


@given(tree_shapes(), st.data())
def test_the_best_part_is_that_of_exhaustive_search(tree: Tree, data: st.DataObject) -> None:
    values = data.draw(npst.arrays(float, len(tree), elements=st.floats(0, 1)))
    size = data.draw(st.integers(0, len(tree) + 1))
    part = trees.best_part(tree, values, size)
    assert tuple(part) in closed_sets(tree)
    assert len(part) <= size
    best = max(values[list(nodes)].sum() for nodes in closed_sets(tree) if len(nodes) <= size)
    assert values[part].sum() == pytest.approx(best)


@given(tree_shapes(), npst.arrays(float, 4, elements=st.floats(0.01, 0.25)), st.integers(0, 9))
def test_by_survival_the_best_part_is_the_largest_values(tree: Tree, p: trees.Floats, size: int) -> None:
    survival = trees.survival(tree, p)
    part = trees.best_part(tree, survival, size)
    assert survival[part].sum() == pytest.approx(np.sort(survival)[::-1][:size].sum())


def test_a_part_of_a_long_chain_needs_no_deep_stack() -> None:
    assert trees.best_part(Tree.chain(3000), np.ones(3000), 2) == [0, 1]
