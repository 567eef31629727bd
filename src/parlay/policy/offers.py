"""From offers to numbers: how likely every guess on offer is accepted, row by row."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parlay.bets import Bet, Tree
from parlay.policy.acceptance import LEVELS, RANKS, Acceptance, MethodAcceptance
from parlay.policy.allocation import Bools, Candidates, Guesses, ManyTrees, OneTree
from parlay.policy.base import PolicyRow
from parlay.policy.confidence import ConfidenceCurve
from parlay.policy.cost import DraftCost
from parlay.policy.trees import Floats, Ints, child_ranks, subtree
from parlay.types import Offer

logger = logging.getLogger(__name__)

UNLIKELY = 0.01  # guesses that survive less often are not looked at, but in trees so large that they may pay
TELLING, MOVED = 50, 0.3  # trials before the log is told anything; and change that it is told
KEPT = 64  # trees for which a drafter's results are kept


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a step as arrays, [rows] each."""

    seqs: list[int]
    start: Ints
    count: Ints
    samples: Bools
    deepest: Ints  # 0 where nothing may be bet
    sampled: int  # rows that sample
    wishes: bool  # whether some row asked for more than its share

    @classmethod
    def of(cls, rows: Sequence[PolicyRow]) -> Rows:
        if not rows:
            none = np.zeros(0, dtype=np.intp)
            return cls([], none, none, none.astype(bool), none, 0, False)
        read = [(r.seq, r.start, r.count, r.samples, r.max_depth, r.speculation, r.target_tpot) for r in rows]
        seqs, start, count, samples, depth, asked, targets = map(list, zip(*read, strict=True))
        emits = np.array(samples, dtype=bool)
        deepest = np.array(depth, dtype=np.intp) * emits
        if "off" in asked:
            deepest[[wish == "off" for wish in asked]] = 0
        sampled = sum(row.samples and not row.is_greedy for row in rows)
        wishes = "max" in asked or targets.count(None) < len(rows)
        return cls(
            seqs, np.array(start, dtype=np.intp), np.array(count, dtype=np.intp), emits, deepest, sampled, wishes
        )

    @property
    def sampled_share(self) -> float:
        """Of the rows that emit."""
        return self.sampled / max(1, int(self.samples.sum()))


def least_survival(size: int) -> float:
    """Of guesses that are looked at, in a tree of this size."""
    return min(UNLIKELY, 0.5 / size)


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """A tree as arrays, [nodes] each."""

    depths: Ints
    level: Ints  # row of an acceptance matrix
    rank: Ints  # column of it
    known: Bools  # whether it has such a column; other children are taken for never accepted
    levels: int
    ranks: int
    parents: Ints
    by_level: Sequence[Ints]  # nodes of each level

    def survival(self, single: Floats) -> Floats:
        """[groups, nodes] from how likely each is accepted if its parent is.

        Level by level: large products of matrices would wake a pool of threads of their own, which then waits busily
        beside the model's (a step took 200 ms instead of 100).
        """
        found = single.copy()
        for nodes in self.by_level[1:]:
            found[:, nodes] *= found[:, self.parents[nodes]]
        return found


@lru_cache(maxsize=4096)
def _shape(tree: Tree) -> _Shape:
    depths, ranks = np.array(tree.depths), child_ranks(tree)
    level, rank = np.minimum(depths, LEVELS) - 1, np.minimum(ranks, RANKS - 1)
    by_level = [(depths == depth).nonzero()[0] for depth in range(1, tree.depth + 1)]
    levels, columns = int(level.max()) + 1, int(rank.max()) + 1
    return _Shape(depths, level, rank, ranks < RANKS, levels, columns, np.array(tree.parents), by_level)


class Drafter:
    """What is known of one method, and what follows from it for the trees that it offers again and again.

    Args:
        method: Its name.
        acceptance: How often its guesses are accepted.

    Attributes:
        offered: Share of the rows that could bet for which it had guesses, lately.
    """

    def __init__(self, method: str, acceptance: Acceptance) -> None:
        self.method, self.acceptance, self.confidence = method, acceptance, ConfidenceCurve()
        self.offered = 1.0
        self._told: float | None = None  # share of first guesses accepted, as the log knows it
        self._survivals: dict[Tree, tuple[Floats, Floats]] = {}
        self._bets: dict[Tree, dict[tuple[int, ...], Bet]] = {}

    def tell(self) -> None:
        """Says in the log when guesses have become much better or worse."""
        known = self.acceptance
        if isinstance(known, MethodAcceptance) and known.trials >= TELLING:
            now = float(known.pool[0, 0])
            before, self._told = self._told, now if self._told is None or abs(now - self._told) > MOVED else self._told
            if before not in (None, self._told):
                logger.info(
                    "%.0f%% of the first guesses of %s are accepted, not %.0f%%", 100 * now, self.method, 100 * before
                )

    def survival(self, tree: Tree) -> Floats:
        """[groups, nodes] how likely each node is accepted, by group of requests; 0 where it is too unlikely.

        An optimal subset must take siblings in their order, so none counts as more likely than an elder one.
        """
        matrices, known = self.acceptance.matrices, self._survivals.get(tree)
        if known is None or known[0] is not matrices:
            shape = _shape(tree)
            falling = np.minimum.accumulate(matrices[:, : shape.levels, : shape.ranks], axis=-1)
            single = np.where(shape.known, falling[:, shape.level, shape.rank], 0.0)
            value = np.cumprod(single, axis=1) if tree.is_chain else shape.survival(single)
            if len(self._survivals) >= KEPT:
                self._survivals.clear()
            known = self._survivals[tree] = matrices, np.where(value < least_survival(len(tree)), 0.0, value)
        return known[1]

    def parts(self, tree: Tree) -> dict[tuple[int, ...], Bet]:
        """Bets on parts of a tree by their nodes, as far as they were made before."""
        if tree not in self._bets:
            if len(self._bets) >= KEPT:
                self._bets.clear()
            self._bets[tree] = {}
        return self._bets[tree]


class Made(NamedTuple):
    """A bet as it was made: on what offer, and which nodes of the offered tree it consists of."""

    offer: Offer
    bet: Bet
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class MethodOffers:
    """What one method offers to the rows of a step.

    Attributes:
        drafter: The method.
        offers: Per tree of the candidates.
        candidates: The same for the optimiser.
        catch_up: [offers] seconds that reading what was missed takes.
        common: The tree that all of them offer, or the longest of their chains; None if they differ.
    """

    drafter: Drafter
    offers: Sequence[Offer]
    candidates: Candidates
    catch_up: Floats
    common: Tree | None

    @property
    def method(self) -> str:
        return self.drafter.method

    @classmethod
    def of(
        cls,
        drafter: Drafter,
        places: Sequence[int],
        offers: Sequence[Offer],
        rows: Rows,
        cost: DraftCost,
        horizon: float,
    ) -> MethodOffers:
        """Values every guess by its survival.

        Args:
            drafter: The method.
            places: The row of each offer.
            offers: All of this method.
            rows: The step's.
            cost: Of betting on its guesses, beside the pass.
            horizon: Steps over which reading what was missed is spread.
        """
        at = np.array(places)
        seqs = rows.seqs if len(places) == len(rows.seqs) else [rows.seqs[place] for place in places]
        limits = rows.deepest[at]
        own, catch_up = np.full(len(offers), cost.per_row), np.zeros(len(offers))
        if cost.per_context:
            own += cost.per_context * rows.start[at]
        if cost.per_catch_up:
            catch_up = cost.per_catch_up * np.array([offer.catch_up for offer in offers])
            own += catch_up / horizon
        trees = [offer.tree for offer in offers]
        common = _common(trees, [offer.confidence for offer in offers])
        if common is None:
            guesses = _different(drafter, offers, seqs, limits)
            candidates: Candidates = ManyTrees(at, own, cost, int(guesses.depth.max(initial=0)), guesses)
        else:
            if common.is_chain:
                limits = np.minimum(limits, [len(tree.parents) for tree in trees])
            shape, group = _shape(common), drafter.acceptance.groups(seqs)
            table = drafter.survival(common)
            candidates = OneTree(at, own, cost, common.depth, table, group, limits, shape.depths)
        return cls(drafter, offers, candidates, catch_up, common)

    def bets(self, bought: Guesses) -> list[tuple[int, Made]]:
        """Rows, and the bet that was made on each."""
        sizes = np.bincount(bought.tree)  # guesses come tree by tree
        places, nodes = sizes.nonzero()[0].tolist(), bought.node.tolist()
        known = {} if self.common is None else self.drafter.parts(self.common)
        rows, found, end = self.candidates.rows[places].tolist(), [], 0
        for row, place, size in zip(rows, places, sizes[places].tolist(), strict=True):
            start, end = end, end + size
            some, offer = tuple(nodes[start:end]), self.offers[place]
            bet = known.get(some)
            if bet is None:
                bet = Bet(self.method, subtree(offer.tree, some), free=True)
                if self.common is not None:
                    known[some] = bet
            found.append((row, Made(offer, bet, some)))
        return found


def _common(trees: Sequence[Tree], confidences: Sequence[object]) -> Tree | None:
    """The tree that all of them are, or the longest of them if all are chains; None if they differ otherwise."""
    if confidences.count(None) < len(trees):
        return None
    different = dict(zip(map(id, trees), trees, strict=True)).values()
    if len(different) == 1:
        return trees[0]
    return max(different, key=len) if all(tree.is_chain for tree in different) else None


def _different(drafter: Drafter, offers: Sequence[Offer], seqs: Sequence[int], limits: Ints) -> Guesses:
    """Guesses of rows that were offered a tree of their own each, down to each row's limit. limits: [offers]."""
    flat = itertools.chain.from_iterable
    sizes = np.array([len(offer.tree.parents) for offer in offers])
    total, ends = int(sizes.sum()), np.cumsum(sizes)
    place = np.repeat(np.arange(len(offers)), sizes)
    node = np.arange(total) - np.repeat(ends - sizes, sizes)
    depth = np.fromiter(flat([offer.tree.depths for offer in offers]), np.intp, total)
    parent = np.fromiter(flat([offer.tree.parents for offer in offers]), np.intp, total)
    words = [offer.confidence for offer in offers if offer.confidence is not None]
    value = drafter.confidence(np.fromiter(flat(words), np.float64, sum(map(len, words))))
    if len(words) < len(offers):
        told = np.array([offer.confidence is not None for offer in offers])[place]
        sure, value = value, np.empty(total)
        value[told] = sure
        shapes = [_shape(offer.tree) for offer in offers]
        level, rank, known = (np.concatenate([getattr(s, n) for s in shapes]) for n in ("level", "rank", "known"))
        falling = np.minimum.accumulate(drafter.acceptance.matrices, axis=-1)
        group = drafter.acceptance.groups(seqs)[place]
        value[~told] = np.where(known, falling[group, level, rank], 0.0)[~told]
    above = np.arange(total) - node + parent
    for level in range(2, int(depth.max()) + 1):
        some = np.flatnonzero(depth == level)
        value[some] *= value[above[some]]
    likely = np.flatnonzero((value >= UNLIKELY) & (depth <= limits[place]))
    return Guesses(place, node, depth, value).of(likely)
