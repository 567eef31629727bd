"""The short cut: what a few rows should bet, much as in the last whole plan, without NumPy's overhead.

One row's plan takes the optimiser of `parlay.policy.allocation` 0.8 ms, nearly all of it calls of NumPy on arrays of a
dozen numbers, beside steps of 7 to 15 ms. Here rows take their best bets one after the other, each as if the others
bet what they did before, at the price of time that the last whole plan found. For one row that is the optimum at that
price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parlay.bets import Bet
from parlay.policy.acceptance import CERTAIN
from parlay.policy.base import PolicyRow
from parlay.policy.cost import DraftCost
from parlay.policy.offers import Drafter, Made, least_survival
from parlay.policy.trees import Floats, subtree
from parlay.types import Offer

FEW = 4  # rows, at most


class Course(NamedTuple):
    """Guesses of a tree from the likeliest on, no deeper than some depth, each behind its parent.

    For the first n of them: their values together, and their depth.
    """

    nodes: tuple[int, ...]
    values: tuple[float, ...]
    depths: tuple[int, ...]


class _Choice(NamedTuple):
    method: str
    offer: Offer
    nodes: tuple[int, ...]
    value: float
    depth: int


@dataclass(slots=True)
class Quick:
    """What holds until the next whole plan.

    Attributes:
        seconds: Of the step by its guesses, without the drafters'.
        emitting: Rows that emit.
        costs: By method, what its drafter takes.
        sharing: By method, rows that bet on it in the last plan.
        sizes: By row, guesses of its bet in the last plan.
        horizon: Steps over which catching up is spread.
    """

    seconds: list[float]
    emitting: int
    costs: Mapping[str, DraftCost]
    horizon: float
    sharing: dict[str, int]
    sizes: dict[int, int]
    courses: dict[tuple[str, object, int, int], tuple[object, tuple[Course, ...]]] = field(default_factory=dict)

    def plan(
        self,
        rows: Sequence[PolicyRow],
        offers: Sequence[Sequence[Offer]],
        drafters: Mapping[str, Drafter],
        price: float,
        budget: int,
    ) -> tuple[list[Made | None], float, float]:
        """Every row's bet, tokens that are expected, and seconds; no bets cost nothing but the plain step.

        Args:
            rows: All of them emit.
            offers: Per row.
            drafters: What is known of each method.
            price: Tokens that a second is worth.
            budget: Guesses.
        """
        made: list[Made | None] = []
        most = min(budget, len(self.seconds) - 1)
        total = sum(self.sizes.get(row.seq, 0) for row in rows)
        tokens, levels, drafting = float(self.emitting), dict[str, int](), 0.0
        for row, some in zip(rows, offers, strict=True):
            others = total - self.sizes.get(row.seq, 0)
            choice = self._best(row, some, drafters, price, min(others, most), most)
            total = others + (len(choice.nodes) if choice else 0)
            self.sizes[row.seq] = len(choice.nodes) if choice else 0
            if choice is None:
                made.append(None)
                continue
            cost = self.costs[choice.method]
            drafting += cost.per_row + cost.per_guess * len(choice.nodes) + cost.per_context * row.start
            levels[choice.method] = max(levels.get(choice.method, 0), choice.depth)
            tokens += choice.value
            made.append(_bet(drafters[choice.method], choice))
        for method, depth in levels.items():
            drafting += self.costs[method].per_step + self.costs[method].per_level * depth
            self.sharing[method] = sum(bet is not None and bet.bet.method == method for bet in made)
        return made, tokens, self.seconds[min(total, len(self.seconds) - 1)] + drafting

    def _best(
        self,
        row: PolicyRow,
        offers: Sequence[Offer],
        drafters: Mapping[str, Drafter],
        price: float,
        others: int,
        most: int,
    ) -> _Choice | None:
        """What is worth most to a row beside so many guesses of others."""
        best: _Choice | None = None
        worth, seconds = 0.0, self.seconds
        for offer in offers:
            cost, drafter = self.costs.get(offer.method), drafters.get(offer.method)
            if cost is None or drafter is None or row.speculation == "off":
                continue
            share = price / max(1, self.sharing.get(offer.method, 1))
            per_step, per_level = share * cost.per_step, share * cost.per_level
            own = cost.per_row + cost.per_context * row.start + cost.per_catch_up * offer.catch_up / self.horizon
            # What a level costs decides how deep to go; where it costs nothing, the likeliest guesses do.
            for nodes, values, depths in self._courses(drafter, offer, row, cost.per_level > 0):
                for n in range(min(len(nodes), most - others)):
                    found = (
                        values[n]
                        - price * (own + seconds[others + n + 1] - seconds[others] + cost.per_guess * (n + 1))
                        - per_step - per_level * depths[n]
                    )  # fmt: skip
                    if found > worth:
                        worth = found
                        best = _Choice(offer.method, offer, nodes[: n + 1], values[n], depths[n])
        return best

    def _courses(self, drafter: Drafter, offer: Offer, row: PolicyRow, by_depth: bool) -> tuple[Course, ...]:
        """One for every depth that is worth a look, the deepest one only where levels cost nothing."""
        limit = min(row.max_depth, offer.tree.depth)
        if offer.confidence is not None:
            return courses(offer, drafter.confidence.of(offer.confidence), limit, by_depth)
        group = drafter.acceptance.group(row.seq)
        key, matrices = (drafter.method, offer.tree, group, limit), drafter.acceptance.matrices
        known = self.courses.get(key)
        if known is None or known[0] is not matrices:
            table: Floats = drafter.survival(offer.tree)[group]
            known = self.courses[key] = matrices, _ordered(offer, table.tolist(), limit, by_depth)
        return known[1]


def courses(offer: Offer, single: Sequence[float], limit: int, by_depth: bool) -> tuple[Course, ...]:
    """Courses through an offered tree.

    Args:
        offer: The tree.
        single: Per node, how likely it is accepted if its parent is.
        limit: Levels.
        by_depth: Whether to go through it once for every depth.
    """
    values: list[float] = []
    for own, parent in zip(single, offer.tree.parents, strict=True):
        values.append(min(own, CERTAIN) * (values[parent] if parent >= 0 else 1.0))
    return _ordered(offer, values, limit, by_depth)


def _ordered(offer: Offer, values: Sequence[float], limit: int, by_depth: bool) -> tuple[Course, ...]:
    depths, least = offer.tree.depths, least_survival(len(offer.tree))
    order = [node for node, value in enumerate(values) if value >= least and depths[node] <= limit]
    order.sort(key=lambda node: -values[node])  # stable, and no node is worth more than its parent
    deepest = max((depths[node] for node in order), default=0)
    first = 1 if by_depth and not offer.tree.is_chain else deepest
    return tuple(_course(order, values, depths, depth) for depth in range(first, deepest + 1) if depth)


def _course(order: Sequence[int], values: Sequence[float], depths: Sequence[int], limit: int) -> Course:
    nodes, sums, deepest, total, most = [], [], [], 0.0, 0
    for node in order:
        if depths[node] <= limit:
            total, most = total + values[node], max(most, depths[node])
            nodes.append(node)
            sums.append(total)
            deepest.append(most)
    return Course(tuple(nodes), tuple(sums), tuple(deepest))


def _bet(drafter: Drafter, choice: _Choice) -> Made:
    nodes, offer = tuple(sorted(choice.nodes)), choice.offer
    known = drafter.parts(offer.tree)
    bet = known.get(nodes)
    if bet is None:
        bet = known[nodes] = Bet(choice.method, subtree(offer.tree, nodes), free=True)
    return Made(offer, bet, nodes)
