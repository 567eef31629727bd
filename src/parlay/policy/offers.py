"""From offers to numbers: how likely every guess on offer is accepted, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from parlay.policy.acceptance import LEVELS, RANKS, ConfidenceCurve, MethodAcceptance
from parlay.policy.allocation import Bools, Candidates
from parlay.policy.base import PolicyRow
from parlay.policy.cost import DraftCost
from parlay.policy.trees import Floats, Ints, child_ranks, levels, subtree
from parlay.types import Bet, Offer, Tree

UNLIKELY = 0.01  # guesses that survive less often are not looked at


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """A tree as arrays, by node."""

    depths: Ints
    rows: Ints  # of an acceptance matrix
    ranks: Ints  # its columns
    deeper: tuple[tuple[Ints, Ints], ...]  # nodes of every level but the first, and their parents


@lru_cache(maxsize=4096)
def _shape(tree: Tree) -> _Shape:
    parents, depths = np.array(tree.parents, dtype=np.intp), np.array(tree.depths, dtype=np.intp)
    ranks = np.minimum(child_ranks(tree), RANKS)
    deeper = tuple((nodes, parents[nodes]) for nodes in levels(tree)[1:])
    return _Shape(depths, np.minimum(depths, LEVELS) - 1, ranks, deeper)


@lru_cache(maxsize=65536)
def _part(tree: Tree, nodes: tuple[int, ...]) -> Tree:
    return Tree.chain(len(nodes)) if tree.is_chain else subtree(tree, nodes)


@dataclass(frozen=True, slots=True, eq=False)
class MethodOffers:
    """What one method offers to the rows of a step.

    Attributes:
        method: Its name.
        rows: [offers] the row of each.
        trees: [offers] what could be bet on it.
        node: [guesses] of the candidates, which node of its tree each is.
        candidates: The same for the optimiser.
    """

    method: str
    rows: Ints
    trees: tuple[Tree, ...]
    node: Ints
    candidates: Candidates

    @classmethod
    def of(
        cls,
        offered: Sequence[tuple[int, PolicyRow, Offer]],
        acceptance: MethodAcceptance,
        confidence: ConfidenceCurve,
        cost: DraftCost,
        horizon: float,
    ) -> MethodOffers:
        """Values every guess by its survival.

        Args:
            offered: Offers of one method with their rows and the rows' places in the step.
            acceptance: Of this method.
            confidence: What its own estimates are worth.
            cost: Of its drafter.
            horizon: Steps over which reading what was missed is spread.
        """
        matrix = acceptance.matrix([row.seq for _, row, _ in offered])
        # An optimal subset must take siblings in their order, so none may be worth more than an elder one.
        matrix = np.minimum.accumulate(matrix, axis=-1)
        matrix = np.concatenate([matrix, np.zeros((*matrix.shape[:2], 1))], axis=-1)
        alike: dict[Tree, list[int]] = {}
        for place, (_, _, offer) in enumerate(offered):
            alike.setdefault(offer.tree, []).append(place)
        parts: list[tuple[Ints, Ints, Ints, Floats]] = []
        for tree, places in alike.items():
            shape, some = _shape(tree), np.array(places)
            values = matrix[some[:, None], shape.rows, shape.ranks]
            for line, place in enumerate(places):
                if (own := offered[place][2].confidence) is not None:
                    values[line] = confidence(np.array(own))
            for nodes, parents in shape.deeper:
                values[:, nodes] *= values[:, parents]
            deepest = np.array([offered[place][1].max_depth for place in places])
            line, node = np.nonzero((values >= UNLIKELY) & (shape.depths <= deepest[:, None]))
            parts.append((some[line], node, shape.depths[node], values[line, node]))
        place, node, depth, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        own = np.array(
            [cost.per_row + cost.per_context * row.start + cost.per_catch_up * offer.catch_up / horizon
             for _, row, offer in offered]
        )  # fmt: skip
        rows = np.array([index for index, _, _ in offered])
        candidates = Candidates(rows, own, place, depth, value, cost)
        return cls(offered[0][2].method, rows, tuple(offer.tree for _, _, offer in offered), node, candidates)

    def bets(self, bought: Bools) -> list[tuple[int, Bet]]:
        """Rows and their bets. bought: [guesses]."""
        chosen: dict[int, list[int]] = {}
        for place, node in zip(self.candidates.tree[bought].tolist(), self.node[bought].tolist(), strict=True):
            chosen.setdefault(place, []).append(node)
        return [
            (int(self.rows[place]), Bet(self.method, _part(self.trees[place], tuple(nodes))))
            for place, nodes in chosen.items()
        ]
