from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.acceptance import (
    EVERY,
    LEVELS,
    RANKS,
    REFRESH,
    MethodAcceptance,
    Reliability,
    Trials,
    acceptance,
    once_tried,
)
from parlay.policy.confidence import ConfidenceCurve
from tests.policy.machine import walk


def test_only_children_of_accepted_nodes_were_tried() -> None:
    assert Trials.of(Tree.chain(4), (0, 1)) == Trials(((0, 0), (1, 0), (2, 0)), ((0, 0), (1, 0)))
    assert Trials.of(Tree.chain(2), (0, 1)) == Trials(((0, 0), (1, 0)), ((0, 0), (1, 0)))
    assert Trials.of(Tree.chain(2), ()) == Trials(((0, 0),), ())
    assert Trials.of(Tree(()), ()) == Trials((), ())
    tree = Tree((-1, -1, 0, 1, 1))
    assert Trials.of(tree, (1, 4)) == Trials(((0, 0), (0, 1), (1, 0), (1, 1)), ((0, 1), (1, 1)))
    assert Trials.of(tree, (0, 2)) == Trials(((0, 0), (1, 0)), ((0, 0), (1, 0)))
    assert Trials.of(tree, (1,)) == Trials(((0, 0), (0, 1), (1, 0), (1, 1)), ((0, 1),))
    assert Trials.of(tree, ()) == Trials(((0, 0), (0, 1)), ())


@pytest.mark.parametrize("length", [1, 3, 8])
def test_the_estimate_does_not_depend_on_how_much_is_guessed(length: int) -> None:
    """Where accepted over drafted does: with 0.8 and 8 guesses it says 0.42."""
    rng, method, p = np.random.default_rng(0), MethodAcceptance(memory=1e9, pool_weight=1.0), 0.8
    tree, won, drafted = Tree.chain(length), 0, 0
    for seq in range(4000):
        path = walk(tree, np.array([p]), rng)
        method.observe(seq, Trials.of(tree, path))
        a, b = len(path), len(tree)  # accepted over drafted, as it is often reported
        won, drafted = won + a, drafted + b
    assert method.matrix(-1)[0, 0] == pytest.approx(p, abs=0.02)
    biased = p * (1 - p**length) / (length * (1 - p))
    assert won / drafted == pytest.approx(biased, abs=0.02)


def test_levels_and_ranks_of_trees_are_told_apart() -> None:
    rng, method = np.random.default_rng(0), MethodAcceptance(memory=1e9)
    p = np.array([[0.6, 0.2, 0.1], [0.4, 0.3, 0.05]])
    tree = trees.by_level([3, 3])
    for seq in range(6000):
        method.observe(seq, Trials.of(tree, walk(tree, p, rng)))
    assert method.matrix(-1)[:2, :3] == pytest.approx(p, abs=0.025)
    assert trees.expected_emitted(tree, method.matrix(-1)) == pytest.approx(trees.expected_emitted(tree, p), rel=0.03)


def test_a_level_that_was_never_tried_is_taken_for_the_rank_at_other_levels() -> None:
    rng, method = np.random.default_rng(0), MethodAcceptance()
    for seq in range(1000):
        method.observe(seq, Trials.of(Tree.chain(2), walk(Tree.chain(2), np.array([0.9]), rng)))
    assert method.matrix(-1)[LEVELS - 1, 0] == pytest.approx(0.9, abs=0.04)


def test_little_data_changes_little() -> None:
    method = MethodAcceptance(prior=(0.5,))
    assert method.matrix(-1)[0, 0] == pytest.approx(0.5)
    method.observe(0, Trials.of(Tree.chain(1), (0,)))
    assert 0.5 < method.matrix(-1)[0, 0] < 0.6


def test_the_pool_follows_a_change_of_traffic() -> None:
    rng, method, tree = np.random.default_rng(0), MethodAcceptance(memory=300.0), Tree.chain(4)
    for seq in range(1000):
        method.observe(seq, Trials.of(tree, walk(tree, np.array([0.9]), rng)))
    for seq in range(1000):
        method.observe(seq, Trials.of(tree, walk(tree, np.array([0.3]), rng)))
    assert method.matrix(-1)[0, 0] == pytest.approx(0.3, abs=0.07)


def test_requests_differ_from_the_pool_and_are_forgotten() -> None:
    rng, method, tree = np.random.default_rng(0), MethodAcceptance(), Tree.chain(4)
    for _ in range(400):
        method.observe(1, Trials.of(tree, walk(tree, np.array([0.9]), rng)))
        method.observe(2, Trials.of(tree, walk(tree, np.array([0.3]), rng)))
    good, bad = (method.matrix(seq)[:4, 0] for seq in (1, 2))
    assert good == pytest.approx(np.full(4, 0.9), abs=0.1)
    assert bad[:2] == pytest.approx(np.full(2, 0.3), abs=0.1)
    assert method.factor(3) == 1
    method.forget(1)
    assert method.factor(1) == 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**31)), max_size=30),
)  # fmt: skip
def test_estimates_stay_distributions(outcomes: list[tuple[int, int]]) -> None:
    method, p = MethodAcceptance(), np.array([0.5, 0.3, 0.15])
    for seq, seed in outcomes:
        tree = trees.by_level([1 + seed % 3, 1 + seed % 2, 2])
        method.observe(seq, Trials.of(tree, walk(tree, p, np.random.default_rng(seed))))
    matrix = np.stack([method.matrix(seq) for seq in range(5)])
    assert matrix.shape == (5, LEVELS, RANKS)
    assert (matrix >= 0).all()
    assert (matrix.sum(axis=-1) <= 1).all()


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=3))
def test_siblings_exclude_each_other(p: list[float]) -> None:
    assert acceptance(np.array(once_tried(p))) == pytest.approx(np.array(p))


def test_a_rank_that_was_not_tried_for_long_keeps_its_prior() -> None:
    """And stays a number, however often the weights were brought back."""
    method = MethodAcceptance(prior=(0.5, 0.1), memory=20.0)
    for seq in range(20_000):
        method.observe(seq % 5, Trials.of(Tree.chain(3), (0, 1)))
    before = method.pool[0, 1]
    assert before == pytest.approx(0.2)
    for _ in range(REFRESH):
        method.observe(0, Trials.of(trees.kary(2, 1), ()))
    assert 0.0 < method.pool[0, 1] < before
    assert np.isfinite(method.pool).all()


def test_guesses_beyond_what_is_counted_do_no_harm() -> None:
    method = MethodAcceptance()
    wide, deep = trees.kary(RANKS + 3, 1), Tree.chain(LEVELS + 5)
    method.observe(0, Trials.of(wide, (RANKS + 2,)))
    method.observe(0, Trials.of(deep, tuple(range(LEVELS + 5))))
    assert method.matrix(-1)[LEVELS - 1, 0] > 0.5


def test_confidence_is_learnt() -> None:
    """A drafter that is twice as sure of itself, in log-odds, as it should be."""
    rng, curve = np.random.default_rng(0), ConfidenceCurve()
    for _ in range(4000):
        x = rng.normal(0.5, 1.5, 4)
        confidence, truth = 1 / (1 + np.exp(-2 * x)), 1 / (1 + np.exp(-x))
        curve.observe(confidence, rng.random(4) < truth)
    x = np.array([-1.0, 0.0, 1.0])
    assert curve(1 / (1 + np.exp(-2 * x))) == pytest.approx(1 / (1 + np.exp(-x)), abs=0.05)


def test_reliability() -> None:
    good, bad, rng = Reliability(), Reliability(), np.random.default_rng(0)
    for _ in range(20_000):
        p = rng.random()
        good.observe(p, rng.random() < p)
        bad.observe(p, rng.random() < p**2)
    assert good.error < 0.02
    assert bad.error > 0.1
    assert len(good.curve) == 10
    assert all(abs(line["predicted"] - line["accepted"]) < 0.05 for line in good.curve)
    assert Reliability().error == 0
    assert Reliability().curve == []


@pytest.mark.parametrize("every", [48, 800])
def test_a_dozen_probes_outweigh_what_was_true_before(every: int) -> None:
    """However rare they are; without them, what was true before stays believed."""
    rng, chain = np.random.default_rng(0), Tree.chain(2)
    method, silent = MethodAcceptance((0.5,)), MethodAcceptance((0.5,))
    for some in (method, silent):
        for seq in range(4000):
            some.observe(seq % 64, Trials.of(chain, walk(chain, np.array([0.05]), rng)))
            if seq % 64 == 63:
                some.tick()
        assert some.pool[0, 0] < 0.1
    for probe in range(12):
        for _ in range(every):
            method.tick()
            silent.tick()
        method.observe(5000 + probe, Trials.of(chain, (0, 1)))
    for _ in range(EVERY):
        method.tick()
    assert method.pool[0, 0] > 0.35
    assert silent.pool[0, 0] < 0.1


def test_what_is_believed_of_a_rank_is_its_mean_over_the_long_run() -> None:
    rng, tree = np.random.default_rng(0), trees.kary(2, 1)
    method = MethodAcceptance((0.5, 0.1))
    for step in range(6000):  # two kinds of requests, of which each accepts one child only
        kind = step % 4 < 2
        method.observe(step % 4, Trials.of(tree, walk(tree, np.array([0.6, 0.0] if kind else [0.0, 0.6]), rng)))
        method.tick()
    assert method.pool[0, 0] == pytest.approx(0.3, abs=0.1)
    assert 0.0 < method.pool[0, 1] < 1.0


def test_long_silence_does_no_harm() -> None:
    method, chain = MethodAcceptance(), Tree.chain(2)
    for _ in range(200):
        method.observe(0, Trials.of(chain, (0,)))
    for _ in range(100_000):
        method.tick()
    assert np.isfinite(method.pool).all()
    method.observe(0, Trials.of(chain, (0,)))
    assert 0.3 < method.pool[0, 0] < 0.95
