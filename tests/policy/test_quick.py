from __future__ import annotations

import itertools

import numpy as np
import pytest

from parlay.bets import Tree, likely_tree
from parlay.policy.acceptance import MethodAcceptance
from parlay.policy.cost import DraftCost
from parlay.policy.offers import Drafter
from parlay.policy.quick import Quick
from parlay.policy.trees import subtree
from parlay.types import Offer
from tests.policy.machine import FakeRow

TREE = likely_tree(7, 4)
SECONDS = [0.010, 0.0102, 0.0103, 0.012, 0.0125, 0.013, 0.016, 0.0165, 0.02]


def quick(costs: dict[str, DraftCost], emitting: int = 1) -> Quick:
    return Quick(SECONDS, emitting, costs, 32.0, {}, {})


def drafters(**acceptance: tuple[float, ...]) -> dict[str, Drafter]:
    return {name: Drafter(name, MethodAcceptance(prior)) for name, prior in acceptance.items()}


def value(drafter: Drafter, offer: Offer, nodes: tuple[int, ...]) -> float:
    if offer.confidence is None:
        return float(drafter.survival(offer.tree)[drafter.acceptance.group(0), list(nodes)].sum())
    single, total = drafter.confidence(np.array(offer.confidence)), 0.0
    for node in nodes:
        product, at = 1.0, node
        while at >= 0:
            product, at = product * min(single[at], 0.99), offer.tree.parents[at]
        total += product
    return total


@pytest.mark.parametrize("price", [60.0, 90.0, 150.0, 250.0])
@pytest.mark.parametrize("max_depth", [1, 3, 9])
def test_one_row_gets_the_best_of_all_bets(price: float, max_depth: int) -> None:
    costs = {"eagle": DraftCost(0.0003, 0.0008, 2e-5, 5e-5), "suffix": DraftCost()}
    known = drafters(eagle=(0.7, 0.2, 0.05), suffix=(0.5,))
    words = Offer("suffix", Tree((-1, 0, -1, 1)), (1, 2, 3, 4), (0.8, 0.7, 0.15, 0.4))
    offers = [Offer("eagle", TREE), words]
    (made,), tokens, seconds = quick(costs).plan([FakeRow(0, max_depth=max_depth)], [offers], known, price, 100)

    def worth(offer: Offer, nodes: tuple[int, ...]) -> float:
        cost = costs[offer.method]
        drafting = cost(max(offer.tree.depths[node] for node in nodes), 1, len(nodes), 0)
        gain = value(known[offer.method], offer, nodes)
        return gain - price * (SECONDS[len(nodes)] - SECONDS[0] + drafting)

    found = {
        (offer.method, nodes): worth(offer, nodes)
        for offer in offers
        for size in range(1, len(offer.tree) + 1)
        for nodes in itertools.combinations(range(len(offer.tree)), size)
        if all(offer.tree.parents[node] in (-1, *nodes) and offer.tree.depths[node] <= max_depth for node in nodes)
    }
    best = max(found.values())
    if best <= 0:
        assert made is None
        return
    assert made is not None
    assert found[made.offer.method, made.nodes] == pytest.approx(best)
    assert made.bet.tree == subtree(made.offer.tree, made.nodes)
    assert tokens - price * (seconds - SECONDS[0]) == pytest.approx(1 + best)


def test_rows_share_the_budget_and_what_levels_cost() -> None:
    costs = {"eagle": DraftCost(per_level=0.001)}
    known = drafters(eagle=(0.9, 0.05))
    rows = [FakeRow(seq) for seq in range(3)]
    plan = quick(costs, emitting=3)
    plans = [plan.plan(rows, [[Offer("eagle", Tree.chain(4))]] * 3, known, 250.0, 6) for _ in range(4)]
    made, tokens, seconds = plans[-1]
    sizes = [len(some.bet.tree) if some else 0 for some in made]
    assert 0 < sum(sizes) <= 6
    deepest = max(some.bet.tree.depth for some in made if some)
    assert seconds == pytest.approx(SECONDS[sum(sizes)] + 0.001 * deepest)
    assert tokens > 3


def test_who_wants_none_or_may_bet_none_gets_none() -> None:
    known = drafters(suffix=(0.9,))
    offers = [[Offer("suffix", Tree.chain(4))]] * 3
    rows = [FakeRow(0, speculation="off"), FakeRow(1, max_depth=0), FakeRow(2)]
    made, _, _ = quick({"suffix": DraftCost()}, 3).plan(rows, offers, known, 100.0, 8)
    assert [some is not None for some in made] == [False, False, True]
    assert quick({}, 1).plan(rows[2:], offers[2:], known, 100.0, 8)[0] == [None]
