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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from parlay.policy.cost import DraftCost
from parlay.policy.trees import Floats, Ints

Bools = NDArray[np.bool_]

EQUAL = 1e-12  # puts a parent before a child of the same value
LINES = (0.5, 0.0, 1.0)  # slopes at which guesses are priced, times that of the whole pass


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one method could bet: the guesses of all its trees in one list.

    Attributes:
        rows: [trees] the row of each tree.
        own: [trees] seconds that betting on it costs before any guess.
        tree: [guesses] the tree that each belongs to. Guesses come after their parents.
        depth: [guesses] from 1.
        value: [guesses] how likely each is accepted, weighted by how much its row matters; not more than its parent.
        cost: What the drafter takes for steps, levels and guesses.
    """

    rows: Ints
    own: Floats
    tree: Ints
    depth: Ints
    value: Floats
    cost: DraftCost

    @cached_property
    def levels(self) -> int:
        return int(self.depth.max(initial=0))

    @cached_property
    def level_costs(self) -> Floats:
        """[levels + 1] seconds of the drafter by the number of levels, before rows and guesses."""
        levels = np.arange(self.levels + 1)
        return np.where(levels > 0, self.cost.per_step + self.cost.per_level * levels, 0.0)

    @cached_property
    def _place(self) -> Ints:
        return self.depth * len(self.rows) + self.tree

    def worth(self, num_rows: int, price: float, slope: float) -> Floats:
        """[levels + 1, rows] what the guesses down to each depth are worth to a row, above their price."""
        gain = np.maximum(self.value - price * (slope + self.cost.per_guess), 0.0)
        trees = len(self.rows)
        by_level = np.bincount(self._place, gain, (self.levels + 1) * trees)
        worth = np.zeros((self.levels + 1, num_rows))
        worth[1:, self.rows] = by_level.reshape(-1, trees).cumsum(axis=0)[1:] - price * self.own
        return worth


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Guesses for a step, and what is expected of them.

    Attributes:
        method: [rows] index of each row's method, -1 for none.
        guesses: Per method, which of its candidates' guesses are bought.
        emitted: Tokens, weighted like the values.
        seconds: Time of the step.
        line: Which of the `LINES` led to it.
    """

    method: Ints
    guesses: tuple[Bools, ...]
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
        if method.level_costs[-1] > 0:
            best = np.maximum(best[..., None, :], line)
            paid = np.add.outer(paid, price * method.level_costs)
        else:
            best = np.maximum(best, line[-1])
    totals = best.sum(axis=-1) - paid
    depths = iter(np.unravel_index(np.argmax(totals), totals.shape))
    levels = [int(next(depths)) if method.level_costs[-1] > 0 else method.levels for method in methods]
    chosen = np.stack([np.zeros(num_rows), *(line[level] for line, level in zip(worth, levels, strict=True))])
    return np.argmax(chosen, axis=0) - 1, levels


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
    open_to = [
        np.flatnonzero((method[candidates.rows] == index)[candidates.tree] & (candidates.depth <= level))
        for index, (candidates, level) in enumerate(zip(methods, levels, strict=True))
    ]
    values = np.concatenate([np.zeros(0), *(c.value[some] for c, some in zip(methods, open_to, strict=True))])
    order = _largest(values, len(seconds) - 1)
    emitted = certain + np.concatenate(([0.0], np.cumsum(values[order])))
    drafting = np.concatenate(([0.0], _drafting(methods, open_to, order)))
    count = int(np.argmax(emitted - price * (seconds[: len(order) + 1] + drafting)))
    bought = np.zeros(len(values), dtype=bool)
    bought[order[:count]] = True
    guesses, final, start = [], np.full(len(method), -1), 0
    for index, (candidates, some) in enumerate(zip(methods, open_to, strict=True)):
        chosen = np.zeros(len(candidates.value), dtype=bool)
        chosen[some] = bought[start : start + len(some)]
        start += len(some)
        guesses.append(chosen)
        final[candidates.rows[candidates.tree[chosen]]] = index
    return Allocation(final, tuple(guesses), float(emitted[count]), float(seconds[count] + drafting[count]), line)


def _largest(values: Floats, count: int) -> Ints:
    """The places of the largest values, from the largest on; of equal ones the first come first."""
    keys = EQUAL * np.arange(len(values)) - values
    if count >= len(values):
        return np.argsort(keys)
    some = np.argpartition(keys, count)[:count]
    return some[np.argsort(keys[some])]


def _drafting(methods: Sequence[Candidates], open_to: Sequence[Ints], order: Ints) -> Floats:
    """[guesses] seconds of the drafters for the first of the ordered guesses, for the first two, and so on."""
    total, start = np.zeros(len(order)), 0
    for candidates, some in zip(methods, open_to, strict=True):
        low, start = start, start + len(some)
        if not (candidates.level_costs[-1] > 0 or candidates.cost.per_guess > 0 or candidates.own.any()):
            continue
        at = np.flatnonzero((order >= low) & (order < start))  # where this method's guesses are bought
        if not len(at):
            continue
        mine = some[order[at] - low]
        added = np.zeros(len(order))
        added[at] = candidates.cost.per_guess
        trees, first = np.unique(candidates.tree[mine], return_index=True)
        added[at[first]] += candidates.own[trees]
        deepest = np.zeros(len(order), dtype=np.intp)
        deepest[at] = candidates.depth[mine]
        total += np.cumsum(added) + candidates.level_costs[np.maximum.accumulate(deepest)]
    return total


def no_bets(methods: Sequence[Candidates], num_rows: int, certain: float, seconds: Floats) -> Allocation:
    """The allocation that buys nothing."""
    none = tuple(np.zeros(len(method.value), dtype=bool) for method in methods)
    return Allocation(np.full(num_rows, -1), none, certain, float(seconds[0]))


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
