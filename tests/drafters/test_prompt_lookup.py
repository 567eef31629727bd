"""Prompt lookup against a slow and obvious version of itself."""

from __future__ import annotations

from array import array
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.bets import Bet, Tree
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.policy.trees import overlap, subtree
from parlay.types import Request, Row, SamplingParams


def row_of(tokens: list[int], max_depth: int = 99) -> Row:
    request = Request("r", tuple(tokens), SamplingParams())
    return Row(1, request, 0, array("i", tokens), len(tokens), 0, len(tokens), 0, max_depth, [])


def obvious(tokens: list[int], depth: int, sizes: range, order: str) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for size in sizes:
        if size >= len(tokens):
            continue
        starts = [s for s in range(len(tokens) - size) if tokens[s : s + size] == tokens[-size:]]
        for start in starts if order == "earliest" else starts[::-1]:
            copied = list(tokens)
            for i in range(depth):
                copied.append(copied[start + size + i])
            path = tuple(copied[len(tokens) :])
            if path not in found:
                found.append(path)
    return found


@given(
    st.lists(st.integers(0, 3) | st.integers(255, 258), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(["recent", "earliest"]),
)
def test_finds_what_a_slow_search_finds(
    tokens: list[int], depth: int, longest: int, order: Literal["recent", "earliest"]
) -> None:
    drafter = PromptLookup(Tree.chain(depth), max_ngram=longest, order=order)
    found = list(dict.fromkeys(drafter.continuations(array("i", tokens), depth)))
    assert found == obvious(tokens, depth, range(longest, 0, -1), order)
    (offer,) = drafter.offer([row_of(tokens)])
    assert (offer.tokens if offer else None) == (found[0] if found else None)


def test_most_recent_and_earliest() -> None:
    tokens = [1, 2, 7, 7, 1, 2, 8, 8, 1, 2]
    assert PromptLookup(Tree.chain(2)).offer([row_of(tokens)])[0].tokens == (8, 8)  # type: ignore[union-attr]
    assert PromptLookup(Tree.chain(2), order="earliest").offer([row_of(tokens)])[0].tokens == (7, 7)  # type: ignore[union-attr]


def test_branches_share_their_beginnings() -> None:
    tokens = [5, 1, 2, 5, 1, 3, 5, 4, 5]
    (offer,) = PromptLookup(Tree((-1, 0, -1, 2, 2))).offer([row_of(tokens)])
    assert offer is not None
    assert offer.tree == Tree((-1, 0, -1, 2, 2))
    assert offer.tokens == (4, 5, 1, 3, 2)


def test_drafts_keep_to_the_planned_tree() -> None:
    row = row_of([5, 1, 2, 5, 1, 3, 5, 4, 5])
    drafter = PromptLookup(Tree((-1, 0, -1, 2, 2)))
    drafter.offer([row])
    (draft,) = drafter.draft([row], [Bet("prompt_lookup", Tree((-1, -1, 1)))])
    assert draft is not None
    assert (draft.tree, draft.tokens) == (Tree((-1, -1, 1)), (4, 1, 3))


def test_a_pattern_is_continued_past_the_end_of_the_text() -> None:
    (offer,) = PromptLookup(Tree.chain(5)).offer([row_of([9, 1, 2, 3, 1, 2, 3])])
    assert offer is not None
    assert offer.tokens == (1, 2, 3, 1, 2)


def test_nothing_to_find_is_no_offer() -> None:
    for tokens in ([1, 2, 3], [1], [1, 2]):
        assert PromptLookup().offer([row_of(tokens)]) == [None]


def test_offers_are_no_deeper_than_the_row_allows() -> None:
    (offer,) = PromptLookup(Tree.chain(4)).offer([row_of([1] * 9, max_depth=2)])
    assert offer is not None
    assert offer.tree == Tree.chain(2)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="min_ngram"):
        PromptLookup(min_ngram=3, max_ngram=2)


trees = st.lists(st.floats(0, 0.999), max_size=12).map(
    lambda draws: Tree(tuple(int(u * (i + 1)) - 1 for i, u in enumerate(draws)))
)


def rank_paths(tree: Tree) -> list[tuple[int, ...]]:
    """Each node's child ranks from the root: what identifies a node in any tree."""
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for parent, nodes in tree.children().items():
        for rank, node in enumerate(nodes):
            paths[node] = (*paths[parent], rank)
    return [paths[node] for node in range(len(tree))]


@given(trees, trees)
def test_overlap_is_the_nodes_with_the_same_ranks(tree: Tree, bound: Tree) -> None:
    kept = overlap(tree, bound)
    allowed = set(rank_paths(bound))
    paths = rank_paths(tree)
    assert kept == [node for node in range(len(tree)) if paths[node] in allowed]
    assert rank_paths(subtree(tree, kept)) == [paths[node] for node in kept]


@given(trees, st.integers(0, 12), st.integers(0, 6))
def test_trimming_keeps_the_first_nodes_that_are_not_too_deep(tree: Tree, size: int, depth: int) -> None:
    trimmed = tree.trim(size, depth)
    shallow = [path for path, level in zip(rank_paths(tree), tree.depths, strict=True) if level <= depth]
    assert rank_paths(trimmed) == shallow[:size]
