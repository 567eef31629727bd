"""What becomes of simulated bets: one table of chances for every tree that was ever bet, by kind of request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from parlay.bets import NO_TREE, Tree
from parlay.policy.trees import Floats, Ints, survival
from parlay.policy.workload import Kind, Recorded, Shown

APART = 7919  # places of a recording between which requests start


class Outcomes:
    """Draws how far each row's tree is accepted, for all rows at once.

    A walk down a tree ends at some node, or at the root. Its chance of ending at a node is the node's survival times
    the chance that none of its children is accepted. Per bet and kind these chances are summed up, so that one random
    number per row says where it ends. Bet 0 is no bet.

    Args:
        kinds: What requests there are.
        shown: See `Workload`; what became of these guesses is known and not drawn.
    """

    def __init__(self, kinds: Sequence[Kind], shown: Mapping[str, Sequence[Shown]] | None = None) -> None:
        self._kinds, self._shown = tuple(kinds), dict(shown or {})
        self._ids: dict[tuple[str, Tree], int] = {}
        self.bets: list[tuple[str | None, Tree]] = []
        self.paths: list[list[tuple[int, ...]]] = []  # by bet and end: the accepted nodes
        self._sums = np.ones((0, len(kinds), 1))  # [bets, kinds, ends] chance of ending here or before
        self._depth = np.zeros((0, 1), dtype=np.intp)  # [bets, ends] accepted guesses
        self.size = np.zeros(0, dtype=np.intp)  # [bets] guesses
        methods = {method for kind in kinds for method in kind.acceptance}
        self._runs = {method: [_runs(kind, method) for kind in kinds] for method in methods}  # by kind; None: drawn
        hits = any(runs is not None for some in self._runs.values() for runs in some)
        self.recorded = hits or bool(self._shown)
        self._add(None, NO_TREE)

    def bet(self, method: str, tree: Tree) -> int:
        """The number of a bet; a new one for one that was never made."""
        key = method, tree
        if key not in self._ids:
            self._ids[key] = self._add(method, tree)
        return self._ids[key]

    def _add(self, method: str | None, tree: Tree) -> int:
        ends = len(tree) + 1
        sums = np.stack([self._chances(kind, method, tree) for kind in self._kinds])
        width = max(ends, self._sums.shape[2])
        self._sums = _grown(self._sums, (len(self.bets) + 1, len(self._kinds), width), 1.0)
        self._depth = _grown(self._depth, (len(self.bets) + 1, width), 0)
        self._sums[-1, :, :ends] = sums
        self._depth[-1, 1:ends] = tree.depths
        self.size = np.append(self.size, len(tree))
        if method in self._runs and any(runs is not None for runs in self._runs[method]) and not tree.is_chain:
            raise ValueError(f"{method}: recorded hits say what chains gain, not trees")
        self.paths.append(_paths(tree))
        self.bets.append((method, tree))
        return len(self.bets) - 1

    def _chances(self, kind: Kind, method: str | None, tree: Tree) -> Floats:
        """[ends] chance of ending at the root or at one of the first nodes."""
        if method is None or not tree:
            return np.ones(1)
        reached = np.concatenate([[1.0], survival(tree, kind.matrix(method))])
        end = reached.copy()
        np.subtract.at(end, np.array(tree.parents) + 1, reached[1:])
        sums = np.cumsum(end)
        sums[-1] = 1.0
        return sums

    def draw(self, bet: Ints, kind: Ints, chance: Floats, request: Ints, out: Ints) -> tuple[Ints, Ints]:
        """Where each row ends, and how many guesses that accepts.

        Args:
            bet: [rows].
            kind: [rows].
            chance: [rows] or [steps, rows] uniform random numbers; results have the same shape.
            request: [rows] its number.
            out: [rows] what it has emitted; with recorded outcomes, there is no drawing of several steps.
        """
        end = (self._sums[bet, kind] <= chance[..., None]).sum(axis=-1)
        accepted = self._depth[bet, end]
        for row, (number, which) in enumerate(zip(bet, kind, strict=True)) if self.recorded else ():
            method, tree = self.bets[number]
            if method in self._shown:
                end[row] = accepted[row] = min(tree.depth, self._shown[method][request[row]].hits[out[row]])
            elif method is not None and (runs := self._runs[method][which]) is not None:
                place = request[row] * APART + out[row]
                end[row] = accepted[row] = min(tree.depth, runs[place % len(runs)])
        return end, accepted


def _runs(kind: Kind, method: str) -> Ints | None:
    found = kind.acceptance.get(method)
    return found.runs if isinstance(found, Recorded) else None


def _grown(array: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    grown = np.full(shape, fill, dtype=array.dtype)
    grown[tuple(slice(0, size) for size in array.shape)] = array
    return grown


def _paths(tree: Tree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(tree.parents):
        paths.append((*paths[parent + 1], node))
    return paths
