"""Which guesses are worth their time: the optimiser behind the goodput policy.

A step emits F tokens in T seconds. Tokens per second over many steps are highest if every step maximises F - price T,
where price is the rate of tokens that is attained (renewal reward; docs/policy.md derives it). F is a sum over rows, so
rows share the guesses by what the next guess of each is worth:

1. Every row takes the method that is worth most to it at some price of a guess, for given depths of all methods. All
   depths are looked at, since a level of a draft model costs the same for one row as for many.
2. For these methods and depths the best set of n guesses is that of the n largest survivals, for every n at once. No
   guess survives more often than its parent, so such a set is always a set of trees.
3. All n are looked at, as a pass costs a staircase.

Steps 2 and 3 are exact. Step 1 is not: it prices guesses by lines, of several slopes, where a pass costs a staircase.
Against exhaustive search on 3 rows and a steep staircase it loses 0.2% (one method) and 0.4% (two), at worst 5%.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parlay.policy.cost import DraftCost
from parlay.policy.trees import Floats, Ints

Bools = NDArray[np.bool_]

EQUAL = 1e-12  # puts a parent before a child of the same value
LINES = (0.5, 0.0, 1.0)  # slopes at which guesses are priced, times that of the whole pass


class Guesses(NamedTuple):
    """Guesses of one method, [guesses] each: of which tree, which node, how deep, how likely accepted."""

    tree: Ints
    node: Ints
    depth: Ints
    value: Floats

    def of(self, some: Bools | Ints | slice) -> Guesses:
        return Guesses(self.tree[some], self.node[some], self.depth[some], self.value[some])


_NOTHING = np.zeros(0, dtype=np.intp)
NONE = Guesses(_NOTHING, _NOTHING, _NOTHING, np.zeros(0))


@dataclass(eq=False)
class Candidates(ABC):
    """What one method could bet: a tree for each of some rows.

    Attributes:
        rows: [trees] the row of each tree.
        own: [trees] seconds that betting on it costs before any guess.
        cost: What steps, levels and guesses take beside the pass.
        levels: Of the deepest tree.
    """

    rows: Ints
    own: Floats
    cost: DraftCost
    levels: int

    @cached_property
    def level_costs(self) -> Floats:
        """[levels + 1] seconds of the drafter by the number of levels, before rows and guesses."""
        costs = self.cost.per_step + self.cost.per_level * np.arange(self.levels + 1.0)
        costs[0] = 0.0
        return costs

    @property
    def pays_for_levels(self) -> bool:
        """Whether these are not zero."""
        return self.cost.per_step + self.cost.per_level > 0

    @property
    @abstractmethod
    def most(self) -> int:
        """Guesses of the largest tree, at most."""

    @abstractmethod
    def worth(self, num_rows: int, price: float, slope: float) -> Floats:
        """[levels + 1, rows] what the guesses down to each depth are worth to a row, above their price."""

    def _by_row(self, worth: Floats, num_rows: int) -> Floats:
        """[levels + 1, rows] from [levels + 1, trees]; no level is worth nothing and costs nothing."""
        if len(self.rows) == num_rows:
            worth[0] = 0.0
            return worth
        found = np.zeros((self.levels + 1, num_rows))
        found[1:, self.rows] = worth[1:]
        return found

    @abstractmethod
    def chosen(self, trees: Bools, level: int, least: float = 0.0) -> Guesses:
        """The guesses of these trees down to this level that are worth more than `least`, each behind its parent.

        Args:
            trees: [trees] which.
            level: From 1.
            least: A value.
        """

    @abstractmethod
    def weighted(self, weights: Floats) -> Candidates:
        """The same where the tokens of some rows count more. weights: [rows]."""


@dataclass(eq=False)
class ManyTrees(Candidates):
    """A tree of its own for every row.

    Attributes:
        guesses: Of all trees; their values may be weighted.
    """

    guesses: Guesses

    @property
    def most(self) -> int:
        return int(np.bincount(self.guesses.tree).max(initial=0))

    def worth(self, num_rows: int, price: float, slope: float) -> Floats:
        tree, _, depth, value = self.guesses
        gain = np.maximum(value - price * (slope + self.cost.per_guess), 0.0)
        trees = len(self.rows)
        by_level = np.bincount(depth * trees + tree, gain, (self.levels + 1) * trees)
        return self._by_row(by_level.reshape(-1, trees).cumsum(axis=0) - price * self.own, num_rows)

    def chosen(self, trees: Bools, level: int, least: float = 0.0) -> Guesses:
        tree, _, depth, value = self.guesses
        return self.guesses.of(trees[tree] & (depth <= level) & (value > least))

    def weighted(self, weights: Floats) -> Candidates:
        tree, node, depth, value = self.guesses
        value = value * weights[self.rows[tree]]
        return ManyTrees(self.rows, self.own, self.cost, self.levels, Guesses(tree, node, depth, value))


@dataclass(eq=False)
class OneTree(Candidates):
    """The same tree for every row, whose values hang on the group that the row is in.

    Attributes:
        table: [groups, nodes] values; 0 for what is not looked at.
        group: [trees] of each row.
        limit: [trees] how deep each may go.
        depth: [nodes] from 1.
    """

    table: Floats
    group: Ints
    limit: Ints
    depth: Ints

    @property
    def most(self) -> int:
        return len(self.depth)

    def worth(self, num_rows: int, price: float, slope: float) -> Floats:
        gain = np.maximum(self.table - price * (slope + self.cost.per_guess), 0.0)
        level = np.minimum(np.arange(self.levels + 1)[:, None], self.limit)
        order = self.depth.argsort(kind="stable")
        sums = np.zeros((len(gain), len(order) + 1))
        gain[:, order].cumsum(axis=1, out=sums[:, 1:])
        ends = np.searchsorted(self.depth[order], np.arange(self.levels + 1), side="right")
        worth = sums[:, ends][self.group, level]
        return self._by_row(worth - price * self.own, num_rows)

    def chosen(self, trees: Bools, level: int, least: float = 0.0) -> Guesses:
        some = trees.nonzero()[0]
        values = self.table[self.group[some]]
        limit = np.minimum(self.limit[some], level)
        if limit.min(initial=self.levels) < self.levels:
            values = np.where(self.depth <= limit[:, None], values, 0.0)
        place, node = (values > least).nonzero()
        return Guesses(some[place], node, self.depth[node], values[place, node])

    def weighted(self, weights: Floats) -> Candidates:
        all_of_them = self.chosen(np.ones(len(self.rows), dtype=bool), self.levels)
        return ManyTrees(self.rows, self.own, self.cost, self.levels, all_of_them).weighted(weights)


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Guesses for a step, and what is expected of them.

    Attributes:
        method: [rows] index of each row's method, -1 for none.
        guesses: Per method, those that are bought.
        emitted: Tokens, weighted like the values.
        seconds: Time of the step.
        line: Which of the `LINES` led to it.
    """

    method: Ints
    guesses: tuple[Guesses, ...]
    emitted: float
    seconds: float
    line: float = LINES[0]


def allocate(
    methods: Sequence[Candidates],
    num_rows: int,
    certain: float,
    seconds: Floats,
    price: float,
    lines: Sequence[float] = LINES,
) -> Allocation:
    """The guesses that maximise F - price T.

    Args:
        methods: What could be bet.
        num_rows: Rows of the step.
        certain: Tokens emitted without any guess, weighted like the values.
        seconds: [budget + 1] time of a step by the number of guesses in it, without the drafters' time.
        price: Tokens that a second is worth.
        lines: Slopes to price guesses at.
    """
    budget = len(seconds) - 1
    slope = float(seconds[-1] - seconds[0]) / budget if budget else 0.0
    found = (
        buy(methods, *assign(methods, num_rows, price, line * slope), certain, seconds, price, line) for line in lines
    )
    return max(found, key=lambda allocation: allocation.emitted - price * allocation.seconds)


def assign(methods: Sequence[Candidates], num_rows: int, price: float, slope: float) -> tuple[Ints, list[int]]:
    """Every row's method (-1: none) and every method's depth, if a guess took `slope` seconds.

    All depths of the methods that pay for levels are looked at beside each other; others go down as far as they can.
    """
    worth = [method.worth(num_rows, price, slope) for method in methods]
    best = np.zeros(num_rows)  # [.., rows], one axis for every method that pays for levels
    paid: Floats | float = 0.0
    for method, line in zip(methods, worth, strict=True):
        if method.pays_for_levels:
            best = np.maximum(best[..., None, :], line)
            paid = np.add.outer(paid, price * method.level_costs)
        else:
            best = np.maximum(best, line[-1])
    place = int((best.sum(axis=-1) - paid).argmax())
    levels = [method.levels for method in methods]
    for index in range(len(methods) - 1, -1, -1):
        if methods[index].pays_for_levels:
            place, levels[index] = divmod(place, methods[index].levels + 1)
    chosen = np.zeros((len(methods) + 1, num_rows))
    for index, (line, level) in enumerate(zip(worth, levels, strict=True), start=1):
        chosen[index] = line[level]
    return chosen.argmax(axis=0) - 1, levels


def buy(
    methods: Sequence[Candidates],
    method: Ints,
    levels: Sequence[int],
    certain: float,
    seconds: Floats,
    price: float,
    line: float = LINES[0],
) -> Allocation:
    """The best number of guesses, and the best guesses of that number, for given methods and depths."""
    used = set(method.tolist())
    cheapest = max(0.0, float(np.diff(seconds).min(initial=np.inf)))  # a guess that is not worth it is never bought
    open_to = [
        candidates.chosen(method[candidates.rows] == index, level, price * (cheapest + candidates.cost.per_guess))
        if index in used
        else NONE
        for index, (candidates, level) in enumerate(zip(methods, levels, strict=True))
    ]
    values = np.concatenate([NONE.value, *(some.value for some in open_to)])
    order = _largest(values, len(seconds) - 1)
    emitted, time = np.full(len(order) + 1, float(certain)), seconds[: len(order) + 1].copy()
    emitted[1:] += values[order].cumsum()
    time[1:] += _drafting(methods, open_to, order)
    count = int((emitted - price * time).argmax())
    bought = np.zeros(len(values), dtype=bool)
    bought[order[:count]] = True
    guesses, final, start = [NONE] * len(methods), np.full(len(method), -1), 0
    for index, some in enumerate(open_to):
        if len(some.value):
            start, begin = start + len(some.value), start
            guesses[index] = some.of(bought[begin:start])
            final[methods[index].rows[guesses[index].tree]] = index
    return Allocation(final, tuple(guesses), float(emitted[count]), float(time[count]), line)


def _largest(values: Floats, count: int) -> Ints:
    """The places of the largest values, from the largest on; of equal ones the first come first."""
    keys = EQUAL * np.arange(len(values)) - values
    if count >= len(values):
        return np.argsort(keys)
    some = np.argpartition(keys, count)[:count]
    return some[np.argsort(keys[some])]


def _drafting(methods: Sequence[Candidates], open_to: Sequence[Guesses], order: Ints) -> Floats:
    """[guesses] seconds of the drafters for the first of the ordered guesses, for the first two, and so on."""
    used = [(candidates, some) for candidates, some in zip(methods, open_to, strict=True) if len(some.value)]
    added = [  # no guess of a tree is worth more than its first
        candidates.cost.per_guess + (some.node == 0) * candidates.own[some.tree] for candidates, some in used
    ]
    costs, start = np.concatenate([NONE.value, *added]), 0
    total = costs[order].cumsum()
    for candidates, some in used:
        start, begin = start + len(some.value), start
        if candidates.pays_for_levels:
            depth = np.zeros(len(costs), dtype=np.intp)
            depth[begin:start] = some.depth
            total += candidates.level_costs[np.maximum.accumulate(depth[order])]
    return total


def no_bets(methods: Sequence[Candidates], num_rows: int, certain: float, seconds: Floats) -> Allocation:
    """The allocation that buys nothing."""
    return Allocation(np.full(num_rows, -1), (NONE,) * len(methods), certain, float(seconds[0]))


def best_rate(
    methods: Sequence[Candidates],
    num_rows: int,
    certain: float,
    seconds: Floats,
    start: float = 0.0,
    rounds: int = 4,
    lines: Sequence[float] = LINES,
) -> Allocation:
    """The guesses with the most tokens per second, by Dinkelbach's method: the rate at one price is the next price.

    Args:
        methods: As in `allocate`, like the next three.
        num_rows: Rows of the step.
        certain: Tokens without guesses.
        seconds: Time by the number of guesses.
        start: A price near the answer, such as the last one; that of no guess is used where it is higher.
        rounds: At most so many prices are tried; two are enough from a good start.
        lines: Slopes to price guesses at with the first of them; later ones take the slope that was best.
    """
    best = no_bets(methods, num_rows, certain, seconds)
    price = max(start, certain / float(seconds[0]))
    for _ in range(rounds):
        found = allocate(methods, num_rows, certain, seconds, price, lines)
        if found.emitted * best.seconds > best.emitted * found.seconds:
            best = found
        rate = best.emitted / best.seconds
        if abs(rate - price) <= 0.005 * price:
            break
        price, lines = rate, (found.line,)
    return best
