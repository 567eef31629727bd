"""Prompt lookup: bets that what followed the last few tokens before will follow them again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from parlay.engine.batch import Draft
from parlay.policy.trees import overlap, subtree
from parlay.types import Bet, Offer, Row, RowResult, Tree

WIDTH = array("i").itemsize


class PromptLookup:
    """Continues the most recent (or earliest) earlier occurrence of the longest matching suffix.

    After apoorvumang's prompt-lookup-decoding. A continuation that reaches the end of the text goes on with its own
    guesses, as an LZ77 copy does, so that a repeated pattern is continued to any depth. With `branches` above 1,
    distinct continuations of several matches are merged into a tree, the best match first.

    Args:
        depth: Tokens to continue with.
        branches: Continuations to merge.
        max_ngram: Longest suffix to look for.
        min_ngram: Shortest one.
        order: Which occurrence comes first.
    """

    name = "prompt_lookup"
    taps: tuple[int, ...] = ()
    deterministic = True
    owns_kv = False

    def __init__(
        self,
        depth: int = 4,
        branches: int = 1,
        max_ngram: int = 3,
        min_ngram: int = 1,
        order: Literal["recent", "earliest"] = "recent",
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError("prompt_lookup: needs 1 <= min_ngram <= max_ngram")
        self.depth = depth
        self.branches = branches
        self.ngrams = range(max_ngram, min_ngram - 1, -1)
        self.order = order
        self._latest: dict[int, Offer | None] = {}

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        self._latest |= {row.seq: self._offer(row) for row in rows}
        return [self._latest[row.seq] for row in rows]

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet]) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for row, bet in zip(rows, bets, strict=True):
            offer = self._latest.get(row.seq)
            if offer is None or offer.tokens is None:
                drafts.append(None)
                continue
            nodes = overlap(offer.tree, bet.tree)
            tokens = tuple(offer.tokens[node] for node in nodes)
            drafts.append(Draft(self.name, subtree(offer.tree, nodes), tokens))
        return drafts

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult]) -> None:
        pass

    def forget(self, seq: int) -> None:
        self._latest.pop(seq, None)

    def _offer(self, row: Row) -> Offer | None:
        depth = min(self.depth, row.max_depth)
        paths = list(islice(self.continuations(row.tokens, depth), self.branches))
        if not paths:
            return None
        if len(paths) == 1:
            return Offer(self.name, Tree.chain(len(paths[0])), paths[0])
        return Offer(self.name, *_merge(paths))

    def continuations(self, tokens: array[int], depth: int) -> Iterator[tuple[int, ...]]:
        """Distinct continuations of `depth` tokens, longest matching suffix first."""
        text = tokens.tobytes()
        seen: set[tuple[int, ...]] = set()
        for size in self.ngrams:
            if size >= len(tokens):
                continue
            for start in self._occurrences(text, text[-size * WIDTH :]):
                following = tokens[start + size : start + size + depth]
                path = tuple(following[i % len(following)] for i in range(depth))
                if path not in seen:
                    seen.add(path)
                    yield path

    def _occurrences(self, text: bytes, suffix: bytes) -> Iterator[int]:
        """Token positions of earlier occurrences; a byte search, kept to whole tokens."""
        last = len(text) - WIDTH  # an occurrence must end before the text does, so that something follows it
        if self.order == "recent":
            at = text.rfind(suffix, 0, last)
            while at >= 0:
                if at % WIDTH == 0:
                    yield at // WIDTH
                at = text.rfind(suffix, 0, at + len(suffix) - 1)
        else:
            at = text.find(suffix, 0, last)
            while at >= 0:
                if at % WIDTH == 0:
                    yield at // WIDTH
                at = text.find(suffix, at + 1, last)


def _merge(paths: Sequence[tuple[int, ...]]) -> tuple[Tree, tuple[int, ...]]:
    """A tree that holds every path, common beginnings once."""
    parents: list[int] = []
    tokens: list[int] = []
    node_of: dict[tuple[int, int], int] = {}
    for path in paths:
        parent = -1
        for token in path:
            if (parent, token) not in node_of:
                node_of[parent, token] = len(parents)
                parents.append(parent)
                tokens.append(token)
            parent = node_of[parent, token]
    return Tree(tuple(parents)), tuple(tokens)
