"""The dynamic programme against the paper's own numbers, exhaustive search and an independent optimum."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.sequoia import OptimalTrees, best_for_hardware

# Acceptance of Llama3-8B for Llama3-70B on CNN/DailyMail (Sequoia, App. E).
PAPER = np.array([
    0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043, 0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014,
    0.0010, 0.0010, 0.0010, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006, 0.0004, 0.0004, 0.0005, 0.0006, 0.0004, 0.0003,
    0.0002, 0.0004, 0.0001,
])  # fmt: skip


@cache
def forests(nodes: int) -> tuple[tuple, ...]:
    """Every ordered list of trees with so many nodes in all."""
    if nodes == 0:
        return ((),)
    return tuple(
        (first, *rest)
        for own in range(nodes)
        for first in forests(own)
        for rest in forests(nodes - 1 - own)
    )  # fmt: skip


def shape(forest: tuple) -> Tree:
    parents: list[int] = []

    def add(children: tuple, parent: int) -> None:
        for child in children:
            parents.append(parent)
            add(child, len(parents) - 1)

    add(forest, -1)
    return Tree(tuple(parents))


def acceptances(levels: int) -> st.SearchStrategy[np.ndarray]:
    """Rows in any order, not only falling, that sum to at most 1."""
    row = st.lists(st.floats(0, 1), min_size=1, max_size=4)
    padded = row.map(lambda some: np.array(some + [0.0] * (4 - len(some))))
    return st.lists(padded.map(lambda some: some / max(1.0, some.sum())), min_size=levels, max_size=levels).map(
        np.stack
    )


@pytest.mark.parametrize(
    ("nodes", "levels", "emitted"),
    [
        (2, 12, 1.7732), (4, 12, 2.8333), (8, 12, 3.8459), (16, 12, 4.5376), (32, 12, 5.1964), (32, 20, 5.2199),
        (64, 12, 5.8459), (64, 20, 5.9166), (16, 4, 3.4587), (64, 4, 3.7649), (64, 6, 4.8931), (64, 8, 5.4918),
    ],
)  # fmt: skip
def test_the_papers_acceptance_vector(nodes: int, levels: int, emitted: float) -> None:
    optimal = OptimalTrees(PAPER, nodes - 1, levels - 1)
    assert optimal.emitted[levels - 1, nodes - 1] == pytest.approx(emitted, abs=5e-5)
    tree = optimal.tree(nodes - 1, levels - 1)
    assert len(tree) == nodes - 1
    assert tree.depth <= levels - 1
    assert trees.expected_emitted(tree, PAPER) == pytest.approx(emitted, abs=5e-5)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 7])
@given(data=st.data())
def test_no_tree_is_better(levels: int, depth: int, data: st.DataObject) -> None:
    p = data.draw(acceptances(levels))
    size = 6
    optimal = OptimalTrees(p, size, depth)
    best = 1.0
    for nodes in range(size + 1):
        legal = [tree for tree in map(shape, forests(nodes)) if tree.depth <= depth]
        best = max([best, *(trees.expected_emitted(tree, p) for tree in legal)])
        assert optimal.emitted[depth, nodes] == pytest.approx(best)
        found = optimal.tree(nodes, depth)
        assert found.depth <= depth
        assert len(found) <= nodes
        assert trees.expected_emitted(found, p) == pytest.approx(best)


def test_no_tree_of_seven_guesses_is_better_for_the_papers_vector() -> None:
    for depth in (2, 7):
        optimal = OptimalTrees(PAPER, 7, depth)
        legal = [tree for tree in map(shape, forests(7)) if tree.depth <= depth]
        best = max(trees.expected_emitted(tree, PAPER) for tree in legal)
        assert optimal.emitted[depth, 7] == pytest.approx(best)


def largest_survivals(p: np.ndarray) -> Iterator[float]:
    """Of all nodes of the infinite tree, from the largest on, for acceptances that fall from child to child."""
    waiting = [(-p[0], 1.0, 0)]
    while True:
        negative, above, rank = heapq.heappop(waiting)
        yield -negative
        heapq.heappush(waiting, (negative * p[0], -negative, 0))
        if rank + 1 < len(p):
            heapq.heappush(waiting, (-above * p[rank + 1], above, rank + 1))


def test_without_a_limit_the_best_tree_has_the_largest_survivals() -> None:
    p = np.sort(PAPER)[::-1]
    size = 40
    optimal = OptimalTrees(p, size, size)
    expected = 1 + np.cumsum([value for value, _ in zip(largest_survivals(p), range(size), strict=False)])
    assert optimal.emitted[size, 1:] == pytest.approx(expected)


def test_any_beginning_of_a_tree_is_the_best_of_its_size() -> None:
    p = np.sort(PAPER)[::-1]
    optimal = OptimalTrees(p, 30, 30)
    tree = optimal.tree(30, 30)
    for size in range(31):
        assert trees.expected_emitted(tree.trim(size, 30), p) == pytest.approx(optimal.emitted[30, size])


def test_more_is_never_worse() -> None:
    emitted = OptimalTrees(PAPER, 20, 6).emitted
    assert (np.diff(emitted, axis=0) >= -1e-12).all()
    assert (np.diff(emitted, axis=1) >= -1e-12).all()
    assert (emitted[0] == 1).all()


def test_nothing_to_gain() -> None:
    optimal = OptimalTrees(np.zeros(3), 5, 5)
    assert (optimal.emitted == 1).all()
    assert optimal.tree(5, 5) == Tree(())


@pytest.mark.parametrize("p", [[0.7, 0.4], [-0.1], [float("nan")], [[0.5, 0.5], [0.6, 0.5]]])
def test_what_is_no_distribution_is_refused(p: list) -> None:
    with pytest.raises(ValueError, match="acceptance"):
        OptimalTrees(np.array(p), 4, 4)


def test_the_choice_for_the_hardware_is_the_best_of_all() -> None:
    optimal = OptimalTrees(PAPER, 32, 8)

    def verify(guesses: np.ndarray) -> np.ndarray:
        return 1 + 0.02 * np.ceil((guesses + 1) / 8)

    found = best_for_hardware(optimal, verify, 0.05)
    speedups = {
        (size, depth): optimal.emitted[depth, size] / (verify(np.array(size)) + 0.05 * (depth + 1))
        for size in range(1, 33)
        for depth in range(1, 9)
    }
    assert found.speedup == pytest.approx(max(speedups.values()))
    assert speedups[found.size, found.depth] == pytest.approx(found.speedup)


def test_a_draft_that_costs_as_much_as_the_target_is_not_worth_it() -> None:
    found = best_for_hardware(OptimalTrees(PAPER, 16, 4), lambda guesses: np.ones(len(guesses)), 1.0)
    assert (found.size, found.depth, found.speedup) == (0, 0, 1.0)
