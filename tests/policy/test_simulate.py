"""The simulator against what queueing theory, arithmetic and the tree theory say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.fixed import Fixed, Off
from parlay.policy.goodput import Goodput
from parlay.policy.outcomes import Outcomes
from parlay.policy.replica import Replica
from parlay.policy.server import Server, Times
from parlay.policy.simulate import Run, simulate
from parlay.policy.workload import Kind, Phase, Recorded, Shown, Workload, draw
from parlay.types import Offer, StepPlan

PROFILE = Profile(
    "m", "m", "f", VerifyCost.linear(0.010, 0.0001), {"draft": DraftCost(per_level=0.001)}, HostCost(per_step=0.001)
)
KINDS = (Kind("all", 1.0, {"draft": np.array([0.7, 0.1])}),)
OFFERS = [Offer("draft", Tree.chain(6))]


def requests(*some: tuple[float, int, int]) -> Workload:
    arrival, prompt, output = zip(*some, strict=True)
    return Workload(np.array(arrival), np.array(prompt), np.array(output), np.zeros(len(some), dtype=np.intp))


def run(work: Workload, policy: Callable[[], Policy] = Off, **options) -> Run:
    server = Server(PROFILE, **{name: options.pop(name) for name in list(options) if name in Server.__slots__})
    return simulate(server, work, options.pop("kinds", KINDS), options.pop("offers", OFFERS), policy, **options)


def test_one_request_takes_what_its_steps_take() -> None:
    """Three chunks of its prompt, the last of which emits, and then a step per token."""
    found = run(requests((2.0, 250, 5)), max_num_batched_tokens=100)
    chunks = 3 * 0.011 + 250 * 0.0001
    assert found.ttft[0] == pytest.approx(chunks)
    assert found.latency[0] == pytest.approx(chunks + 4 * (0.011 + 0.0001))
    assert found.tpot[0] == pytest.approx(0.0111)


def test_rows_with_few_known_tokens_go_first() -> None:
    """A long prompt that arrives first does not hold up a short one."""
    found = run(requests((0.0, 1000, 1), (0.0, 20, 3)), max_num_batched_tokens=100)
    assert found.finish[1] == pytest.approx(3 * (0.011 + 0.01))
    assert found.first[0] > 10 * 0.02


def test_every_token_is_emitted_and_every_request_ends() -> None:
    work = draw([Phase(20, 10)], (np.array([30, 300]), np.array([1, 40])), KINDS, seed=1)
    for reuse in (1, 8):
        found = run(work, lambda: Fixed("draft", Tree.chain(3)), reuse=reuse)
        assert np.isfinite(found.finish).all()
        assert (found.first > work.arrival).all()
        assert (found.finish >= found.first).all()
        assert found.counts.emitted == work.output.sum()
        assert np.nansum(found.series.tokens_per_second) * np.diff(found.series.seconds)[0] == pytest.approx(
            work.output.sum()
        )


def test_the_seed_fixes_everything() -> None:
    work = draw([Phase(10, 8)], (np.array([64]), np.array([32])), KINDS, seed=3, cv=2.0)
    again = draw([Phase(10, 8)], (np.array([64]), np.array([32])), KINDS, seed=3, cv=2.0)
    first, second = (run(some, lambda: Goodput(PROFILE), seed=5, noise=0.1) for some in (work, again))
    assert (first.finish == second.finish).all()
    assert (first.finish != run(work, lambda: Goodput(PROFILE), seed=6, noise=0.1).finish).any()


def test_looking_ahead_changes_nothing_where_nothing_is_random() -> None:
    work = draw([Phase(20, 6)], (np.array([40, 900]), np.array([20, 60])), KINDS, seed=2)
    step_by_step, ahead = run(work, reuse=1), run(work, reuse=16)
    assert ahead.finish == pytest.approx(step_by_step.finish)
    assert ahead.counts.steps == step_by_step.counts.steps
    assert ahead.counts.plans < step_by_step.counts.plans


@pytest.mark.parametrize("reuse", [1, 16])
def test_trees_gain_what_their_theory_says(reuse: int) -> None:
    tree = trees.by_level([2, 2, 1])
    work = requests(*((0.0, 8, 4000) for _ in range(4)))
    found = run(work, lambda: Fixed("draft", tree), offers=[Offer("draft", tree)], reuse=reuse)
    expected = trees.expected_emitted(tree, np.array([0.7, 0.1]))
    assert found.summary["tokens_per_step"] == pytest.approx(expected, rel=0.03)
    assert found.summary["guesses"] == pytest.approx(len(tree), rel=0.01)


def test_drafts_are_paid_for() -> None:
    """A chain of 3 on one row: its levels, its guesses in the pass, and nothing else."""
    found = run(requests((0.0, 1, 2000)), lambda: Fixed("draft", Tree.chain(3)))
    per_step = 0.011 + 0.003 + 4 * 0.0001
    assert found.counts.busy / found.counts.steps == pytest.approx(per_step, rel=0.01)


def test_a_single_server_queue_waits_as_pollaczek_and_khinchine_say() -> None:
    """One row at a time and one token each: M/D/1, whose mean wait is rho / (2 mu (1 - rho))."""
    service, rho = 0.011 + 10 * 0.0001, 0.7
    work = draw([Phase(25_000 * service, rho / service)], (np.array([10]), np.array([1])), KINDS, seed=0)
    found = run(work, max_num_seqs=1)
    wait = (found.latency - service).mean()
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.08)


def test_kv_is_never_overdrawn_and_nobody_is_lost() -> None:
    """Ten requests that grow beyond the cache: the youngest are preempted, and everybody ends."""
    work = requests(*((0.0, 20, 120) for _ in range(10)))
    for policy in (Off, lambda: Fixed("draft", Tree.chain(4))):
        for reuse in (1, 16):
            found = run(work, policy, kv_tokens=600, reuse=reuse)
            assert found.counts.preemptions > 0
            assert found.counts.emitted == 1200
            assert found.finish[0] == found.finish.min()
            assert found.summary["goodput"] < run(work, policy).summary["goodput"]
    with pytest.raises(ValueError, match="140 tokens could never fit"):
        run(work, kv_tokens=139)


def test_routers_share_the_work() -> None:
    work = draw([Phase(10, 40)], (np.array([20, 20, 2000]), np.array([20, 20, 200])), KINDS, seed=4)
    turns, least = (run(work, replicas=4, router=router) for router in ("round_robin", "least_loaded"))
    assert least.latency.mean() < turns.latency.mean()
    assert run(work, replicas=4).latency.mean() < run(work).latency.mean()


class Watching(Fixed):
    """Bets chains of 3, and notes for every row whether it emits and may be bet on."""

    def __init__(self) -> None:
        super().__init__("draft", Tree.chain(3))
        self.seen: set[tuple[bool, bool]] = set()

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        plan = super().plan(rows, offers, budget)
        self.seen |= {(row.samples, row.max_depth > 0) for row in rows}
        assert all(bet is None or row.samples for row, bet in zip(rows, plan.bets, strict=True))
        return plan


def test_nothing_is_bet_on_rows_that_still_read_their_prompt() -> None:
    policy = Watching()
    found = run(requests((0.0, 10, 40), (0.0, 2000, 40)), lambda: policy, max_num_batched_tokens=100)
    assert (False, False) in policy.seen
    assert (False, True) not in policy.seen
    assert found.counts.guesses <= 3 * found.counts.emitting


@pytest.mark.parametrize("reuse", [1, 16])
def test_noise_has_the_spread_that_was_asked_for(reuse: int) -> None:
    times: list[float] = []
    server = Server(PROFILE, noise=0.3)
    work = requests((0.0, 1, 6000))
    replica = Replica(
        server, work, Outcomes(KINDS), Off(), OFFERS, Times(np.zeros(1), np.zeros(1)), np.random.default_rng(0),
        note=lambda now, *_: times.append(now), reuse=reuse,
    )  # fmt: skip
    replica.send(0)
    now = 0.0
    while not replica.idle:
        now, _ = replica.step(now)
    logs = np.log(np.diff([*times, now]) / 0.0111)
    assert logs.std() == pytest.approx(0.3, rel=0.05)
    assert abs(np.corrcoef(logs[:-1], logs[1:])[0, 1]) < 0.05


def test_recorded_hits_are_replayed_as_they_came() -> None:
    """Guesses that hit twice and then miss: a chain of 5 emits 3 tokens every step."""
    kinds = (Kind("code", 1.0, {"draft": Recorded(np.array([True, True, False] * 10))}),)
    found = run(requests((0.0, 1, 301)), lambda: Fixed("draft", Tree.chain(5)), kinds=kinds, reuse=4)
    assert found.summary["tokens_per_step"] == pytest.approx(3, rel=0.02)
    tree = trees.kary(2, 2)
    with pytest.raises(ValueError, match="chains"):
        run(requests((0.0, 1, 9)), lambda: Fixed("draft", tree), kinds=kinds, offers=[Offer("draft", tree)])


def test_guesses_that_were_shown_come_true_as_they_did() -> None:
    """A drafter that shows two guesses at every third token, and is right both times; it bets on nothing else."""
    offers = [Offer("draft", Tree.chain(2), None, (0.9, 0.9)) if place % 3 == 0 else None for place in range(300)]
    shown = Shown(tuple(offers), tuple(2 * (offer is not None) for offer in offers))
    work = dataclasses.replace(requests((0.0, 1, 300)), shown={"draft": (shown,)})
    found = run(work, lambda: Fixed("draft", Tree.chain(5)))
    assert found.counts.steps == 100
    assert found.counts.accepted == found.counts.guesses == 200
    late = dataclasses.replace(shown, offers=(None, *offers[:-1]), hits=(0, *shown.hits[:-1]))
    found = run(dataclasses.replace(work, shown={"draft": (late,)}), lambda: Fixed("draft", Tree.chain(5)))
    assert found.counts.steps == 101  # one without a guess, 99 with two, and nothing is left to guess at the end
    assert run(work, lambda: Goodput(PROFILE)).summary["tokens_per_step"] > 2


class Sparing(Fixed):
    """Bets on every other step, and notes how much the drafter would have to read."""

    def __init__(self) -> None:
        super().__init__("draft", Tree.chain(1))
        self.unread: list[int] = []

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        self.unread += [offer.catch_up for some in offers for offer in some]
        return super().plan(rows, offers, budget if len(self.unread) % 2 else 0)


def test_drafters_read_what_they_missed_before_they_guess() -> None:
    """The prompt first, and then what was emitted since their last guess."""
    policy = Sparing()
    never = (Kind("all", 1.0, {"draft": np.array([0.0])}),)
    profile = dataclasses.replace(PROFILE, drafts={"draft": DraftCost(per_catch_up=0.001)})
    work = requests((0.0, 200, 6))
    found = simulate(Server(profile), work, never, OFFERS, lambda: policy, reuse=1)
    assert policy.unread == [200, 1, 2, 1, 2]  # no offer beside the prompt
    plain = run(work)
    assert found.counts.guesses == 2
    policy.unread.clear()
    simulate(Server(profile, windows={"draft": 64}), work, never, OFFERS, lambda: policy, reuse=1)
    assert policy.unread[0] == 64
    reading = 0.202
    assert found.counts.busy == pytest.approx(plain.counts.busy + reading + 2 * 0.0001)


def test_what_sampling_costs_does_not_bear_on_simulated_steps() -> None:
    """They are greedy ones, for the policy as for the machine."""
    work = draw([Phase(20, 10)], (np.array([30]), np.array([40])), KINDS, seed=1)
    drawn = {"drawing": {"draft": DraftCost(per_guess=0.1)}, "sampling": HostCost(0.1), "choosing": DraftCost(0.1)}
    plain, dear = (
        simulate(Server(profile), work, KINDS, OFFERS, lambda profile=profile: Goodput(profile))
        for profile in (PROFILE, dataclasses.replace(PROFILE, **drawn))
    )
    assert dear.finish.tolist() == plain.finish.tolist()


def test_slower_machines_are_simulated_slower() -> None:
    work = draw([Phase(30, 2)], (np.array([50]), np.array([50])), KINDS, seed=0)
    slow = dataclasses.replace(PROFILE, verify=VerifyCost.linear(0.020, 0.0002), host=HostCost(per_step=0.002))
    ratio = simulate(Server(slow), work, KINDS, OFFERS, Off).latency.mean() / run(work).latency.mean()
    assert 1.9 < ratio < 2.2


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        run(Workload(np.zeros(0), (none := np.zeros(0, dtype=np.intp)), none, none))
