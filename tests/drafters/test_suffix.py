"""Suffix decoding against a slow and obvious version of itself."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.bets import Bet, Tree
from parlay.drafters.suffix import EDGE, GRAMS, OCCURRENCES, REACH, Occurrences, Suffix
from parlay.policy.trees import kary, overlap, subtree
from parlay.types import Offer, Request, Row, SamplingParams


def row_of(tokens: list[int], max_depth: int = 99, seq: int = 1, prompt: int | None = None) -> Row:
    request = Request("r", tuple(tokens[:prompt]), SamplingParams())
    return Row(seq, request, 0, array("i", tokens), len(tokens), 0, len(tokens), 0, max_depth, [])


def obvious(text: list[int], suffix: list[int], depth: int, oldest: int) -> list[tuple[int, list[int]]]:
    """Lengths and what followed of the latest matches of the longest gram that matches at all."""
    for size in GRAMS:
        if size > len(suffix) or EDGE in suffix[-size:]:
            continue
        ends = [end for end in range(oldest + size, len(text)) if text[end - size : end] == suffix[-size:]]
        if ends:
            break
    else:
        return []
    found = []
    for end in ends[::-1][:OCCURRENCES]:
        length = 0
        while length < len(suffix) and end - length - 1 >= oldest and text[end - length - 1] == suffix[-length - 1]:
            length += 1
        following = text[end : end + depth]
        found.append((length, following + [EDGE] * (depth - len(following))))
    return found


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([8, 30, 1000]),
)
def test_finds_what_a_slow_search_finds(texts: list[list[int]], suffix: list[int], depth: int, capacity: int) -> None:
    some = Occurrences(capacity)
    whole: list[int] = []
    for text in texts:
        some.append([EDGE, *text])
        whole += [EDGE, *text]
    reach, following = some.find(suffix, depth)
    found = list(zip(reach.tolist(), following.tolist(), strict=True))
    assert len(some) == min(len(whole), capacity)
    assert found == obvious(whole, suffix, depth, max(0, len(whole) - capacity))


def test_what_was_overwritten_is_forgotten() -> None:
    some = Occurrences(64)
    some.append(range(1000))
    assert len(some._latest) <= len(GRAMS) * 64
    assert not len(some.find([3, 4, 5], 2)[0])
    assert some.find([996, 997], 2)[1].tolist() == [[998, 999]]


def test_longer_matches_weigh_more() -> None:
    tokens = [5, 1, 2, 9, 6, 5, 1, 2, 8, 0, 6, 5, 1, 2]
    (offer,) = Suffix(kary(2, 2), shared=0).offer([row_of(tokens)])
    assert offer is not None
    assert offer.confidence is not None
    first = dict(zip(offer.tokens or (), offer.confidence, strict=True))
    assert first[8] > first[9] > 0
    assert first[8] + first[9] < 1


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.sampled_from([Tree.chain(1), Tree.chain(6), kary(2, 3), kary(3, 2), Tree((-1, -1, 0, 0, 1, 2))]),
    st.integers(0, 4),
)
def test_offers_are_what_the_engine_and_the_policy_expect(tokens: list[int], tree: Tree, max_depth: int) -> None:
    drafter = Suffix(tree)
    (offer,) = drafter.offer([row_of(tokens, max_depth)])
    if offer is None:
        return
    assert offer.tree.depth <= max_depth
    assert overlap(offer.tree, tree) == list(range(len(offer.tree)))  # it fits into the planned one
    assert offer.tokens is not None
    assert offer.confidence is not None
    assert len(offer.tokens) == len(offer.confidence) == len(offer.tree)
    for node, children in offer.tree.children().items():
        shares = [offer.confidence[child] for child in children]
        assert all(a >= b for a, b in pairwise(shares)), node
        assert 0 < sum(shares) < 1
        assert len({offer.tokens[child] for child in children}) == len(children)
    (draft,) = drafter.draft([row_of(tokens)], [Bet("suffix", subtree(offer.tree, [0]))])
    assert draft is not None
    assert draft.tokens == offer.tokens[:1]


def test_it_follows_a_growing_text_and_learns_from_answers() -> None:
    drafter, alone = Suffix(Tree.chain(4)), Suffix(Tree.chain(4), shared=0)
    tokens = [7, 7, 1, 2, 3]
    first = row_of(tokens, prompt=2)
    drafter.offer([first])
    alone.offer([first])
    drafter.commit([first], [], {})
    first.tokens.extend([4, 5, 6])
    drafter.forget(first.seq)
    alone.forget(first.seq)
    second = row_of([9, 1, 2, 3], seq=2)
    (offer,) = drafter.offer([second])
    assert offer is not None
    assert offer.tokens == (4, 5, 6)
    assert alone.offer([second]) == [None]
    assert not drafter.offer([row_of([7], seq=3)])[0]  # prompts are not shared


def test_it_learns_from_answers_for_which_it_was_not_asked() -> None:
    drafter = Suffix(Tree.chain(4))
    first = row_of([7, 7, 1, 2, 3], prompt=2)
    for token in (4, 5, 6):
        drafter.commit([first], [], {})
        first.tokens.append(token)
    drafter.forget(first.seq)
    (offer,) = drafter.offer([row_of([9, 1, 2, 3], seq=2)])
    assert offer is not None
    assert offer.tokens == (4, 5, 6)


def test_a_long_match_is_believed_and_a_short_one_hardly() -> None:
    long, short = list(range(REACH + 4)), [1, 2, 3, 90, 91, 3]
    (sure,) = Suffix(Tree.chain(1)).offer([row_of([*long, 50, *long])])
    (unsure,) = Suffix(Tree.chain(1)).offer([row_of(short)])
    assert isinstance(sure, Offer)
    assert isinstance(unsure, Offer)
    assert sure.confidence is not None
    assert unsure.confidence is not None
    assert sure.confidence[0] > 0.9 > 0.3 > unsure.confidence[0]


def test_bad_options_are_refused() -> None:
    for shared in (-1, 1):
        with pytest.raises(ValueError, match="shared must be 0 or at least"):
            Suffix(shared=shared)
