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
from parlay.policy.trees import Floats, Ints, ancestor_mask, child_ranks, subtree
from parlay.types import Bet, Offer, Tree

UNLIKELY = 0.01  # guesses that survive less often are not looked at


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """A tree as arrays, by node.

    Attributes:
        depths: From 1.
        level: Row of an acceptance matrix.
        rank: Column of it.
        ancestors: [ancestors, nodes] 1 where a node has this ancestor or is it.
        size: Levels and ranks that the tree needs.
    """

    depths: Ints
    level: Ints
    rank: Ints
    ancestors: Floats
    size: tuple[int, int]


@lru_cache(maxsize=4096)
def _shape(tree: Tree) -> _Shape:
    depths, ranks = np.array(tree.depths), child_ranks(tree)
    level = np.minimum(depths, LEVELS) - 1
    size = int(level.max()) + 1, min(int(ranks.max()) + 1, RANKS)
    return _Shape(depths, level, ranks, ancestor_mask(tree).T.astype(float), size)


def _survival(shape: _Shape, matrix: Floats) -> Floats:
    """[offers, nodes]: products along paths, of acceptances [offers, levels, ranks]."""
    ranks = matrix.shape[-1]
    single = matrix[:, shape.level, np.minimum(shape.rank, ranks - 1)]
    if shape.rank.max() >= ranks:
        single[:, shape.rank >= ranks] = 0.0
    return np.exp(np.log(np.maximum(single, 1e-12)) @ shape.ancestors)


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
        alike: dict[int, list[int]] = {}
        for place, (_, _, offer) in enumerate(offered):
            alike.setdefault(id(offer.tree), []).append(place)
        shapes = [_shape(offered[places[0]][2].tree) for places in alike.values()]
        deep, wide = (max(sizes) for sizes in zip(*(shape.size for shape in shapes), strict=True))
        matrix = acceptance.matrix([row.seq for _, row, _ in offered], deep, wide)
        # An optimal subset must take siblings in their order, so none may be worth more than an elder one.
        matrix = np.minimum.accumulate(matrix, axis=-1)
        deepest = np.array([row.max_depth for _, row, _ in offered])
        parts: list[tuple[Ints, Ints, Ints, Floats]] = []
        for shape, places in zip(shapes, alike.values(), strict=True):
            some = np.array(places)
            values = _survival(shape, matrix[some])
            for line, place in enumerate(places):
                if (own := offered[place][2].confidence) is not None:
                    values[line] = np.exp(np.log(confidence(np.array(own))) @ shape.ancestors)
            line, node = np.nonzero((values >= UNLIKELY) & (shape.depths <= deepest[some, None]))
            parts.append((some[line], node, shape.depths[node], values[line, node]))
        columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        place, node, depth, value = columns
        rows = np.array([index for index, _, _ in offered])
        own = np.full(len(offered), cost.per_row)
        if cost.per_context or cost.per_catch_up:
            own += cost.per_context * np.array([row.start for _, row, _ in offered])
            own += cost.per_catch_up / horizon * np.array([offer.catch_up for _, _, offer in offered])
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
