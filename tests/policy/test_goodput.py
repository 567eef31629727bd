from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.acceptance import RANKS, MethodAcceptance
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.policy.offers import Drafter
from parlay.types import Offer, StepPlan
from tests.policy.machine import FakeRow, Machine, guesses, rows

IDLE = VerifyCost((1, 16, 64, 256), (0.010, 0.011, 0.020, 0.080))  # the first guesses are nearly free, many are not
PROFILE = Profile("m", "m", "f", IDLE, {"draft_model": DraftCost(per_level=0.001)}, HostCost(per_row=1e-5))
CHAIN = Tree.chain(6)


def test_it_bets_when_idle_and_not_when_busy() -> None:
    machine = Machine(Goodput(PROFILE, priors={"prompt_lookup": (0.7,)}), {"prompt_lookup": 0.7}, PROFILE)
    offer = [Offer("prompt_lookup", CHAIN)]
    alone = [machine.step(rows(1), offer) for _ in range(50)]
    assert guesses(alone[-1]) >= 4
    crowded = Machine(Goodput(PROFILE, priors={"prompt_lookup": (0.3,)}), {"prompt_lookup": 0.3}, PROFILE)
    plans = [crowded.step(rows(200), offer, 1000) for _ in range(50)]
    assert sum(guesses(plan) for plan in plans[10:]) < 0.1 * 40 * 200


@pytest.mark.parametrize("accept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 8, 48])
def test_it_is_as_fast_as_the_best_fixed_length_and_off(accept: float, count: int) -> None:
    machine = Machine(Goodput(PROFILE), {"prompt_lookup": accept}, PROFILE)
    for _ in range(150):
        machine.step(rows(count), [Offer("prompt_lookup", CHAIN)])
    machine.rate()
    for _ in range(max(100, 2000 // count)):
        machine.step(rows(count), [Offer("prompt_lookup", CHAIN)])
    best = max(
        count * trees.expected_emitted(Tree.chain(k), np.array([accept]))
        / (float(PROFILE.verify(count * (k + 1), count, count * 200)) + PROFILE.host(count, 0))
        for k in range(7)
    )  # fmt: skip
    assert machine.rate() > 0.97 * best


def test_the_better_method_wins_row_by_row() -> None:
    machine = Machine(Goodput(PROFILE), {"prompt_lookup": 0.2, "draft_model": 0.9}, PROFILE)
    both = [Offer("prompt_lookup", CHAIN), Offer("draft_model", CHAIN)]
    plans = [machine.step(rows(8), both) for _ in range(200)]
    assert {bet.method for bet in plans[-1].bets if bet is not None} == {"draft_model"}
    machine.accept = {"prompt_lookup": 0.95, "draft_model": 0.1}
    plans = [machine.step(rows(8), both) for _ in range(600)]
    used = [bet.method for bet in plans[-1].bets if bet is not None]
    assert used.count("prompt_lookup") > 6


@pytest.mark.parametrize("bad", [0.0, 0.02])
def test_off_ends_when_guesses_become_good_and_costs_little_meanwhile(bad: float) -> None:
    policy = Goodput(PROFILE)
    machine = Machine(policy, {"draft_model": bad}, PROFILE)
    offer = [Offer("draft_model", CHAIN)]
    for _ in range(400):
        machine.step(rows(4), offer)
    machine.rate()
    for _ in range(1000):
        machine.step(rows(4), offer)
    off = 4 / (float(PROFILE.verify(4, 4, 804)) + PROFILE.host(4, 0))
    assert machine.rate() > 0.985 * off
    machine.accept = {"draft_model": 0.95}
    plans = [machine.step(rows(4), offer) for _ in range(3000)]
    assert guesses(plans[-1]) > 8


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    policy = Goodput(PROFILE)
    machine = Machine(policy, {"prompt_lookup": 0.5}, PROFILE)
    for _ in range(50):
        machine.step(rows(4), [Offer("prompt_lookup", CHAIN)])
    machine.slower = 2.0
    for _ in range(80):
        machine.step(rows(4), [Offer("prompt_lookup", CHAIN)])
    assert policy.clock.verify.scale.factor == pytest.approx(2, rel=0.1)


def test_what_it_expects_is_what_happens() -> None:
    policy = Goodput(PROFILE)
    machine = Machine(policy, {"draft_model": 0.7}, PROFILE)
    for _ in range(100):
        machine.step(rows(8), [Offer("draft_model", CHAIN)])
    machine.rate()
    tokens = seconds = 0.0
    for _ in range(200):
        machine.step(rows(8), [Offer("draft_model", CHAIN)])
        tokens, seconds = tokens + policy.expected.emitted, seconds + policy.expected.seconds
    assert tokens == pytest.approx(machine.tokens, rel=0.05)
    assert seconds == pytest.approx(machine.seconds, rel=0.05)


def test_wishes_limits_and_rooms_are_respected() -> None:
    policy = Goodput(PROFILE, priors={"prompt_lookup": (0.9,)})
    some = [
        FakeRow(0, speculation="off"), FakeRow(1, max_depth=2), FakeRow(2, samples=False, count=64), FakeRow(3),
        FakeRow(4, max_depth=0),
    ]  # fmt: skip
    plan = policy.plan(some, [[Offer("prompt_lookup", CHAIN)]] * 5, 100)
    assert [bet is None for bet in plan.bets] == [True, False, True, False, True]
    assert plan.bets[1] is not None
    assert plan.bets[1].tree.depth == 2
    assert guesses(policy.plan(some, [[Offer("prompt_lookup", CHAIN)]] * 5, 3)) <= 3
    assert guesses(policy.plan(some, [[Offer("prompt_lookup", CHAIN)]] * 5, 0)) == 0
    assert policy.plan(some[2:3], [[]], 10).bets == (None,)
    assert policy.plan([], [], 10).bets == ()


def test_a_row_that_wants_the_lowest_latency_gets_more() -> None:
    busy = [FakeRow(seq) for seq in range(64)]
    offers = [[Offer("prompt_lookup", CHAIN)]] * 64
    usual = Goodput(PROFILE, priors={"prompt_lookup": (0.6,)}).plan(busy, offers, 256)
    busy[5] = dataclasses.replace(busy[5], speculation="max")
    wanted = Goodput(PROFILE, priors={"prompt_lookup": (0.6,)}).plan(busy, offers, 256)
    assert guesses(StepPlan((wanted.bets[5],))) > guesses(StepPlan((usual.bets[5],)))


def test_a_row_with_a_target_is_served_first() -> None:
    some = [FakeRow(seq) for seq in range(48)]
    offers = [[Offer("prompt_lookup", CHAIN)]] * 48
    usual = Goodput(PROFILE, priors={"prompt_lookup": (0.6,)}).plan(some, offers, 256)
    some[7] = dataclasses.replace(some[7], target_tpot=0.011)
    wanted = Goodput(PROFILE, priors={"prompt_lookup": (0.6,)}).plan(some, offers, 256)
    assert guesses(StepPlan((wanted.bets[7],))) > guesses(StepPlan((usual.bets[7],)))


def test_what_is_expected_of_rows_with_wishes_is_counted_in_tokens() -> None:
    some = [FakeRow(seq, target_tpot=1e-6) for seq in range(31)] + [FakeRow(31, speculation="max")]
    policy = Goodput(PROFILE, priors={"prompt_lookup": (0.6,)})
    plan = policy.plan(some, [[Offer("prompt_lookup", CHAIN)]] * 32, 256)
    assert 32 < policy.expected.emitted < 32 + guesses(plan)


def test_a_hopeless_method_does_not_keep_others_from_being_tried() -> None:
    policy = Goodput(PROFILE, priors={"good": (0.02,)})
    offers = [Offer("hopeless", Tree.chain(1), confidence=(0.002,)), Offer("good", Tree.chain(1))]
    machine = Machine(policy, {"hopeless": 0.0, "good": 0.02}, PROFILE)
    tried = sum(guesses(machine.step(rows(4), offers)) for _ in range(1500))
    assert tried > 30


def test_children_beyond_the_known_ranks_are_worth_nothing() -> None:
    values = Drafter("m", MethodAcceptance((0.15,) * 6)).survival(trees.kary(20, 1))
    assert (values.sum(axis=1) <= 1).all()
    assert (values[:, RANKS:] == 0).all()


def test_beside_a_long_prompt_it_does_not_bet_as_if_time_were_free() -> None:
    policy = Goodput(PROFILE, priors={"draft_model": (0.5,)})
    offer = [[Offer("draft_model", Tree.chain(12))]]
    alone = [policy.plan([FakeRow(0)], offer, 64) for _ in range(5)][-1]
    prompt = FakeRow(1, start=0, count=512, samples=False)
    beside = policy.plan([FakeRow(0), prompt], [*offer, []], 64)
    assert guesses(beside) <= guesses(alone) + 1


def test_catching_up_is_paid_for() -> None:
    cost = DraftCost(per_level=0.0005, per_catch_up=0.001)
    profile = dataclasses.replace(PROFILE, drafts={"draft_model": cost})
    for missed, bets in ((0, True), (2000, False)):
        policy = Goodput(profile, priors={"draft_model": (0.5,)}, probe_share=0.0)
        plan = policy.plan([FakeRow(0)], [[Offer("draft_model", CHAIN, catch_up=missed)]], 64)
        assert (guesses(plan) > 0) == bets


def test_confidence_decides_between_offers() -> None:
    policy = Goodput(PROFILE)
    sure, unsure = (Offer("suffix", Tree.chain(3), confidence=(p,) * 3) for p in (0.95, 0.05))
    plan = policy.plan([FakeRow(0), FakeRow(1)], [[sure], [unsure]], 64)
    assert plan.bets[0] is not None
    assert len(plan.bets[0].tree) == 3
    assert plan.bets[1] is None or len(plan.bets[1].tree) < 2


def test_parts_of_wide_trees_keep_the_order_of_siblings() -> None:
    policy = Goodput(PROFILE, priors={"draft_model": (0.4, 0.2, 0.1)})
    tree = trees.by_level([3, 3, 2])
    plan = policy.plan(rows(6), [[Offer("draft_model", tree)]] * 6, 60)
    assert guesses(plan) > 6
    for bet in plan.bets:
        assert bet is not None
        assert trees.subtree(tree, trees.overlap(tree, bet.tree)) == bet.tree


@pytest.mark.parametrize("prior", [0.05, 0.5])
def test_a_method_that_became_good_is_back_soon(prior: float) -> None:
    policy = Goodput(PROFILE, priors={"prompt_lookup": (prior,)})
    machine = Machine(policy, {"prompt_lookup": 0.05}, PROFILE)
    offer = [Offer("prompt_lookup", CHAIN)]
    for _ in range(500):
        machine.step(rows(32), offer)
    machine.accept = {"prompt_lookup": 0.9}
    assert any(guesses(machine.step(rows(32), offer)) > 32 for _ in range(800))


def test_a_method_that_only_one_row_wants_does_not_rest() -> None:
    policy = Goodput(PROFILE, priors={"prompt_lookup": (0.4,)})
    some = [FakeRow(seq, speculation="max" if seq == 5 else "auto") for seq in range(64)]
    plans = [policy.plan(some, [[Offer("prompt_lookup", CHAIN)]] * 64, 256) for _ in range(20)]
    assert all(plan.bets[5] is not None for plan in plans)


def test_a_cheap_method_does_not_keep_a_costly_one_from_being_tried() -> None:
    policy = Goodput(PROFILE, priors={"prompt_lookup": (0.02,), "draft_model": (0.02,)})
    machine = Machine(policy, {"prompt_lookup": 0.0, "draft_model": 0.0}, PROFILE)
    tried = {"prompt_lookup": 0, "draft_model": 0}
    for _ in range(2000):
        for bet in machine.step(rows(8), [Offer(name, CHAIN) for name in tried]).bets:
            if bet is not None:
                tried[bet.method] += 1
    assert min(tried.values()) > 0
