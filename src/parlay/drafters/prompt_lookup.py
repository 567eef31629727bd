"""Prompt lookup: bets that what followed the last few tokens before will follow them again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from parlay.bets import Tree
from parlay.drafters.base import ShownGuesses
from parlay.types import Offer, Row

WIDTH = array("i").itemsize
MATCHES = 64  # earlier occurrences that are looked at to fill a tree


class PromptLookup(ShownGuesses):
    """Continues the most recent (or earliest) earlier occurrence of the longest matching suffix.

    After apoorvumang's prompt-lookup-decoding. A continuation that reaches the end of the text goes on with its own
    guesses, as an LZ77 copy does, so that a repeated pattern is continued to any depth. A tree is filled with the
    continuations of further matches, common beginnings once, the best match first.

    Args:
        tree: The largest tree to fill.
        max_ngram: Longest suffix to look for.
        min_ngram: Shortest one.
        order: Which occurrence comes first.
    """

    name = "prompt_lookup"

    def __init__(
        self,
        tree: Tree = Tree.chain(4),
        max_ngram: int = 3,
        min_ngram: int = 1,
        order: Literal["recent", "earliest"] = "recent",
    ) -> None:
        super().__init__(tree)
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError("prompt_lookup: needs 1 <= min_ngram <= max_ngram")
        self.ngrams = range(max_ngram, min_ngram - 1, -1)
        self.order = order

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        bound = self.tree.trim(len(self.tree), row.max_depth)
        guesses = _Filling(bound)
        for path in islice(self.continuations(row.tokens, bound.depth), MATCHES):
            guesses.add(path)
            if len(guesses.tokens) == len(bound):
                break
        return Offer(self.name, Tree(tuple(guesses.parents)), tuple(guesses.tokens)) if guesses.tokens else None

    def continuations(self, tokens: array[int], depth: int) -> Iterator[tuple[int, ...]]:
        """Continuations of `depth` tokens, longest matching suffix first."""
        text = tokens.tobytes()
        for size in self.ngrams:
            if size < len(tokens):
                for start in self._occurrences(text, text[-size * WIDTH :]):
                    following = tokens[start + size : start + size + depth]
                    yield tuple(following[i % len(following)] for i in range(depth))

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


class _Filling:
    """A planned tree on its way to being filled with paths of tokens."""

    def __init__(self, bound: Tree) -> None:
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self._places = bound.children()  # of the planned tree
        self._place = {-1: -1}  # planned node of each filled one
        self._children: dict[int, dict[int, int]] = {-1: {}}  # of each filled node: by token

    def add(self, path: Sequence[int]) -> None:
        """Follows a path as far as it is there already, and adds what the planned tree has places for."""
        parent = -1
        for token in path:
            here = self._children[parent]
            if token not in here:
                places = self._places.get(self._place[parent], [])
                if len(here) == len(places):
                    return
                node = len(self.tokens)
                self._place[node] = places[len(here)]
                self._children[node] = {}
                here[token] = node
                self.parents.append(parent)
                self.tokens.append(token)
            parent = here[token]
