from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.allocation import Allocation, Guesses, ManyTrees, best_rate, buy
from parlay.policy.cost import DraftCost, VerifyCost

Bet = tuple[int, int, tuple[int, ...]]  # method, place among its candidates, guesses
STAIRS = VerifyCost((1, 4, 5, 8, 9, 12), (10.0, 10.0, 13.0, 13.0, 17.0, 17.0))


def candidates(rows: list[int], tree: Tree, accept: list[np.ndarray], cost: DraftCost, own: float = 0.0) -> ManyTrees:
    values = np.concatenate([trees.survival(tree, p) for p in accept])
    places, depths = np.repeat(np.arange(len(rows)), len(tree)), np.tile(np.array(tree.depths), len(rows))
    guesses = Guesses(places, np.tile(np.arange(len(tree)), len(rows)), depths, values)
    return ManyTrees(np.array(rows), np.full(len(rows), own), cost, tree.depth, guesses)


def every_bet(method: ManyTrees, place: int) -> Iterator[tuple[int, ...]]:
    """All ancestor-closed sets of one row's guesses that are not empty; the tree is a chain or of one level."""
    nodes = np.flatnonzero(method.guesses.tree == place).tolist()
    if method.levels == len(nodes):
        yield from (tuple(nodes[:count]) for count in range(1, len(nodes) + 1))
    else:
        yield from (some for count in range(1, len(nodes) + 1) for some in itertools.combinations(nodes, count))


def charge(methods: list[ManyTrees], bets: list[Bet], rows: int, seconds: np.ndarray) -> tuple[float, float]:
    """Tokens and seconds of bets, counted anew."""
    emitted, guesses, time = float(rows), 0, 0.0
    for index, method in enumerate(methods):
        mine = [(place, nodes) for which, place, nodes in bets if which == index]
        if mine:
            bought = [node for _, nodes in mine for node in nodes]
            time += method.cost.per_step + method.cost.per_level * int(method.guesses.depth[bought].max())
            time += method.cost.per_guess * len(bought) + sum(float(method.own[place]) for place, _ in mine)
            emitted += float(method.guesses.value[bought].sum())
            guesses += len(bought)
    return emitted, time + float(seconds[guesses]) if guesses < len(seconds) else np.inf


def exhaustive(methods: list[ManyTrees], rows: int, seconds: np.ndarray) -> Iterator[tuple[float, float]]:
    """Every way to bet, row by row."""
    choices: list[list] = []
    for row in range(rows):
        own: list = [None]
        for index, method in enumerate(methods):
            for place in np.flatnonzero(method.rows == row):
                own += [(index, int(place), nodes) for nodes in every_bet(method, int(place))]
        choices.append(own)
    for bets in itertools.product(*choices):
        yield charge(methods, [bet for bet in bets if bet is not None], rows, seconds)


def check(found: Allocation, methods: list[ManyTrees], rows: int, seconds: np.ndarray) -> None:
    """What an allocation says of itself is true."""
    bets = []
    for index, (method, bought) in enumerate(zip(methods, found.guesses, strict=True)):
        for place in np.unique(bought.tree).tolist():
            own = np.flatnonzero(method.guesses.tree == place)
            bets.append((index, place, tuple(own[bought.node[bought.tree == place]])))
            assert found.method[method.rows[place]] == index
    assert len(bets) == (found.method >= 0).sum()
    assert (found.emitted, found.seconds) == pytest.approx(charge(methods, bets, rows, seconds))


def instance(seed: int, methods: int) -> tuple[list[ManyTrees], np.ndarray]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(methods):
        rows = [row for row in range(3) if rng.random() < 0.8] or [0]
        tree = Tree.chain(3) if rng.random() < 0.6 else trees.by_level([2])
        accept = [np.array([rng.uniform(0.2, 0.95)]) for _ in rows]
        if tree.depth == 1:
            accept = [-np.sort(-rng.dirichlet([2, 1, 1])[:2]) for _ in rows]
        cost = DraftCost(rng.uniform(0, 1), rng.uniform(0, 1.5), 0, rng.uniform(0, 0.2))
        found.append(candidates(rows, tree, accept, cost, rng.uniform(0, 0.3)))
    return found, STAIRS(np.arange(3, 3 + 8), 0, 0)


@pytest.mark.parametrize("count", [1, 2])
def test_the_gap_to_exhaustive_search(count: int) -> None:
    """Three rows on a steep staircase, where pricing guesses by lines is as bad as it gets."""
    gaps = []
    for seed in range(60):
        methods, seconds = instance(seed, count)
        found = best_rate(methods, 3, 3.0, seconds)
        check(found, methods, 3, seconds)
        best = max(emitted / time for emitted, time in exhaustive(methods, 3, seconds))
        gaps.append(1 - found.emitted / found.seconds / best)
    assert np.mean(gaps) < 0.005
    assert max(gaps) < 0.06
    assert min(gaps) > -1e-9


@pytest.mark.parametrize("seed", range(40))
def test_given_methods_and_depths_the_shares_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    accept = [np.array([p]) for p in rng.uniform(0.1, 0.95, 3)]
    methods = [candidates([0, 1, 2], Tree.chain(3), accept, DraftCost())]
    seconds, price = STAIRS(np.arange(3, 3 + 10), 0, 0), rng.uniform(0.05, 0.5)
    found = buy(methods, np.zeros(3, dtype=int), [3], 3.0, seconds, price)
    best = max(emitted - price * time for emitted, time in exhaustive(methods, 3, seconds))
    assert found.emitted - price * found.seconds == pytest.approx(best)


def test_a_dip_in_the_middle_of_a_staircase_is_crossed() -> None:
    """The first guesses buy nothing but a new step of the staircase, which only many more of them pay for."""
    seconds = np.array([10.0, 13.0, 13.1, 13.2, 13.3, 13.4, 13.5, 13.6])
    methods = [candidates([0], Tree.chain(7), [np.array([0.9])], DraftCost())]
    found = best_rate(methods, 1, 1.0, seconds)
    assert len(found.guesses[0].value) == 7


def test_a_draft_that_costs_more_than_it_gives_is_off() -> None:
    methods = [candidates([0, 1], Tree.chain(4), [np.array([0.8])] * 2, DraftCost(per_level=10.0))]
    found = best_rate(methods, 2, 2.0, STAIRS(np.arange(2, 10), 0, 0))
    assert (found.method == -1).all()
    assert found.emitted == 2


def test_a_level_is_paid_once_for_all_rows() -> None:
    """Too dear for one row, worth it for three."""
    cost, seconds = DraftCost(per_level=4.0), np.full(20, 10.0)
    one = best_rate([candidates([0], Tree.chain(1), [np.array([0.5])], cost)], 1, 1.0, seconds)
    three = best_rate([candidates([0, 1, 2], Tree.chain(1), [np.array([0.5])] * 3, cost)], 3, 3.0, seconds)
    assert one.emitted / one.seconds == pytest.approx(1.5 / 14)  # from 0.1: barely
    dear = DraftCost(per_level=6.0)
    one = best_rate([candidates([0], Tree.chain(1), [np.array([0.5])], dear)], 1, 1.0, seconds)
    assert (one.method == -1).all()
    assert (three.method == 0).all()


def test_good_rows_get_the_guesses_where_there_is_room_for_few() -> None:
    methods = [candidates([0, 1], Tree.chain(4), [np.array([0.9]), np.array([0.4])], DraftCost())]
    found = best_rate(methods, 2, 2.0, np.full(4, 10.0))
    assert found.guesses[0].tree.tolist() == [0, 0, 0]


def test_no_offers_and_no_room() -> None:
    nothing = best_rate([], 2, 2.0, np.array([10.0]))
    assert (nothing.method == -1).all()
    full = best_rate([candidates([0], Tree.chain(2), [np.array([0.9])], DraftCost())], 1, 1.0, np.array([10.0]))
    assert (full.method == -1).all()
