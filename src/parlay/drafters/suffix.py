"""Suffix decoding: bets that what followed the longest match of the latest tokens before will follow it again.

After SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975): searched are a row's own text and the answers to earlier
requests. Where that paper keeps suffix trees of depth 64, here every position is indexed by its last few tokens only,
and the texts themselves tell how far a match reaches back: a token costs memory once, not once per depth.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parlay.bets import Tree
from parlay.drafters.base import ShownGuesses
from parlay.policy.trees import Ints
from parlay.types import Offer, Row, RowResult

if TYPE_CHECKING:
    import torch

GRAMS = (3, 2, 1)  # tokens by which positions are found, the longest first
OCCURRENCES = 32  # that are kept of each, the latest
REACH = 16  # tokens to look back at most
ESCAPE = 4.0  # weight of what was never seen
EDGE = -1  # a token that matches nothing


class Occurrences:
    """A text that is appended to, and where its grams are; the oldest tokens make room for new ones.

    Occurrences of a gram are chained, the latest first, as LZ77 compressors do it.

    Args:
        capacity: Tokens that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._end = 0  # tokens ever appended; token i is at place i modulo the capacity
        self._text = array("q")
        self._before = {size: array("q") for size in GRAMS}  # where the gram that ends here ended before; 0 for nowhere
        self._latest: dict[tuple[int, ...], int] = {}
        self._last: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._text)

    @property
    def _oldest(self) -> int:
        return self._end - len(self._text)

    def append(self, tokens: Iterable[int]) -> None:
        """Reads on. An `EDGE` parts two texts."""
        for token in tokens:
            self._last = (*self._last[-(GRAMS[0] - 1) :], token) if token != EDGE else ()
            if len(self._text) == self._capacity:
                self._drop()
            self._put(self._text, token)
            for size, before in self._before.items():
                gram = self._last[-size:]
                if len(gram) < size:
                    self._put(before, 0)
                    continue
                self._put(before, self._latest.get(gram, 0))
                self._latest[gram] = self._end + 1
            self._end += 1

    def _put(self, column: array[int], value: int) -> None:
        if len(column) < self._capacity:
            column.append(value)
        else:
            column[self._end % self._capacity] = value

    def _drop(self) -> None:
        """Forgets the grams that begin at the oldest token, where they came only once."""
        oldest = self._oldest
        text = [self._text[(oldest + i) % self._capacity] for i in range(GRAMS[0])]
        for size in GRAMS:
            gram = tuple(text[:size])
            if self._latest.get(gram) == oldest + size:
                del self._latest[gram]

    def find(self, suffix: Sequence[int], depth: int) -> tuple[Ints, Ints]:
        """Where the end of a text was seen before, the latest first.

        Args:
            suffix: The last tokens of a text, at most `REACH`.
            depth: How many following tokens are wanted.

        Returns:
            [matches] how many tokens match, and [matches, depth] what followed, `EDGE` where nothing did.
        """
        ends = next((ends for size in GRAMS if size <= len(suffix) and (ends := self._ends(tuple(suffix[-size:])))), [])
        where = np.array(ends, dtype=np.intp)[:, None] + np.arange(-len(suffix), depth)
        there = (where >= self._oldest) & (where < self._end)
        places = np.where(there, where, self._oldest) % self._capacity
        text = np.where(there, np.frombuffer(self._text, dtype=np.int64)[places], EDGE) if ends else places
        same = text[:, : len(suffix)][:, ::-1] == np.array(suffix)[::-1]
        return np.logical_and.accumulate(same, axis=1).sum(axis=1), text[:, len(suffix) :]

    def _ends(self, gram: tuple[int, ...]) -> list[int]:
        """Where a gram ended before, as far as something follows it."""
        found: list[int] = []
        before, end = self._before[len(gram)], self._latest.get(gram, 0)
        while len(found) < OCCURRENCES and end and end - len(gram) >= self._oldest:
            if end < self._end:
                found.append(end)
            end = before[(end - 1) % self._capacity]
        return found


class _Guess(NamedTuple):
    """A token behind a node, in the order in which guesses are taken."""

    unlikely: float  # minus the estimate along its path
    parent: int
    place: int  # in the planned tree; siblings in their order
    token: int
    share: float  # of the estimate, if its parent is right
    level: int
    matches: list[int]


class Suffix(ShownGuesses):
    """Continues the longest matches of a row's latest tokens, in its own text and in earlier answers.

    A match of m tokens weighs m^1.5; a token's estimate is its matches' weight over that of all of them and of what was
    never seen. Guesses with the highest estimates along their path fill the tree.

    Args:
        tree: Says how many guesses are looked for at most, and how deep.
        shared: Tokens of earlier answers that are kept; 0 keeps none.
        least: Guesses that are estimated lower along their path are left out.
    """

    name = "suffix"

    def __init__(self, tree: Tree = Tree.chain(8), shared: int = 200_000, least: float = 0.05) -> None:
        super().__init__(tree)
        if 0 < shared < REACH or shared < 0 or not 0 <= least < 1:
            raise ValueError(f"suffix: shared must be 0 or at least {REACH}, and least from 0 to below 1")
        self.least = least
        self._places = tree.children()
        self._capacity = shared
        self.forget_answers()
        self._own: dict[int, Occurrences] = {}
        self._rows: dict[int, tuple[array[int], int]] = {}  # seq -> its tokens, and where its answer begins

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        own = self._own.get(row.seq)
        if own is None:
            own = self._own[row.seq] = Occurrences(1 << 40)
        own.append(row.tokens[len(own) : row.length])
        suffix = row.tokens[max(0, row.length - REACH) : row.length]
        depth = min(self.tree.depth, row.max_depth)
        found = [some.find(suffix, depth) for some in (own, self.shared) if some is not None]
        reach = np.concatenate([lengths for lengths, _ in found])
        if not len(reach):
            return None
        return self._fill(reach, np.concatenate([texts for _, texts in found]))

    def _fill(self, reach: Ints, texts: Ints) -> Offer | None:
        """Fills places of the tree, the most likely guess first. reach: [matches]. texts: [matches, depth]."""
        lines = texts.tolist()
        weights = ((reach[:, None] + np.arange(texts.shape[1])) ** 1.5).tolist()
        parents: list[int] = []
        tokens: list[int] = []
        confidence: list[float] = []
        open_guesses: list[_Guess] = []

        def look_behind(node: int, place: int, likely: float, level: int, matches: Sequence[int]) -> None:
            places = self._places.get(place, ())
            if not places or level == texts.shape[1]:
                return
            by_token: dict[int, list[int]] = {}
            weight: dict[int, float] = {}
            for match in matches:
                token = lines[match][level]
                if token != EDGE:
                    by_token.setdefault(token, []).append(match)
                    weight[token] = weight.get(token, 0.0) + weights[match][level]
            total = ESCAPE + sum(weight.values())
            best = sorted(weight, key=lambda token: -weight[token])
            for rank, token in zip(places, best, strict=False):
                share = weight[token] / total
                if likely * share >= self.least:
                    heapq.heappush(
                        open_guesses, _Guess(-likely * share, node, rank, token, share, level, by_token[token])
                    )

        look_behind(-1, -1, 1.0, 0, range(len(lines)))
        while open_guesses:
            guess = heapq.heappop(open_guesses)
            parents.append(guess.parent)
            tokens.append(guess.token)
            confidence.append(guess.share)
            look_behind(len(tokens) - 1, guess.place, -guess.unlikely, guess.level + 1, guess.matches)
        if not tokens:
            return None
        return Offer(self.name, Tree(tuple(parents)), tuple(tokens), tuple(confidence))

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """See `Drafter`; answers are remembered though nobody asks for guesses meanwhile."""
        for row in rows:
            if row.seq not in self._rows:
                self._rows[row.seq] = row.tokens, len(row.request.prompt)

    def forget_answers(self) -> None:
        """See `Drafter`."""
        self.shared = Occurrences(self._capacity) if self._capacity else None

    def forget(self, seq: int) -> None:
        """See `Drafter`; what was answered is kept for others."""
        super().forget(seq)
        self._own.pop(seq, None)
        text, start = self._rows.pop(seq, (array("i"), 0))
        if self.shared is not None and len(text) > start:
            self.shared.append([EDGE, *text[start:]])
