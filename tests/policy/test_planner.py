from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy import trees
from parlay.policy.cost import DraftCost, HostCost, Profile, VerifyCost
from parlay.policy.planner import Planner, length_table, trtllm_schedule, vllm_bands
from parlay.policy.profiles import BUILTIN, read_profile
from parlay.policy.synergy import LengthTable

PROFILE = Profile(
    "m", "m", "f", VerifyCost.linear(0.010, 0.0002, 0.00001, 1e-8),
    {"draft": DraftCost(0.0005, 0.001, 1e-5, 2e-6, 1e-9)}, HostCost(0.0005, 1e-5, 1e-6),
)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 7, 40, 300])
def test_the_best_bet_is_the_best_of_all_sizes_and_depths(batch: int) -> None:
    """Against the cost of every chain, written out."""
    acceptance, context = np.array([0.75]), 300
    plan = Planner(PROFILE, {"draft": acceptance}, context=context, depth=9, chains=True).best(batch)
    rates = []
    for length in range(10):
        seconds = float(PROFILE.verify(batch * (1 + length), batch, batch * context))
        seconds += PROFILE.host(batch, batch * length)
        if length:
            seconds += PROFILE.draft("draft")(length, batch, batch * length, batch * context)
        rates.append(batch * trees.expected_emitted(Tree.chain(length), acceptance) / seconds)
    assert len(plan.tree) == int(np.argmax(rates))
    assert plan.tokens_per_second == pytest.approx(max(rates))
    assert plan.speedup == pytest.approx(max(rates) / rates[0])


def test_sampled_rows_pay_for_drawing_and_choosing() -> None:
    drawing, choosing = DraftCost(per_level=0.0002, per_guess=0.0004), DraftCost(0.0005, 0.0, 0.0003, 0.0005)
    dear = replace(PROFILE, sampling=HostCost(0.0, 0.0002), drawing={"draft": drawing}, choosing=choosing)
    acceptance = {"draft": np.array([0.6, 0.15])}
    greedy, sampled = (Planner(dear, acceptance, size=24, depth=6, sampled=some) for some in (False, True))
    assert len(sampled.best(2).tree) < len(greedy.best(2).tree)
    assert greedy.best(2).tree == Planner(PROFILE, acceptance, size=24, depth=6).best(2).tree
    more = [float(some.seconds(2, np.array(8), np.array(3), "draft")) for some in (greedy, sampled)]
    assert more[1] - more[0] == pytest.approx(2 * 0.0002 + drawing(3, 2, 16, 0) + choosing(3, 2, 16, 0))
    more = [float(some.seconds(2, np.array(0), np.array(0), None)) for some in (greedy, sampled)]
    assert more[1] - more[0] == pytest.approx(2 * 0.0002)


def test_bets_shrink_with_the_batch_and_end_at_the_break_even() -> None:
    planner = Planner(PROFILE, {"draft": np.array([0.7, 0.1, 0.05])}, size=32, depth=8)
    plans = [planner.best(batch) for batch in (1, 4, 16, 64, 256, 1024)]
    assert [len(plan.tree) for plan in plans] == sorted((len(plan.tree) for plan in plans), reverse=True)
    even = planner.break_even(600)
    assert even is not None
    assert planner.best(even).method == "draft"
    assert planner.best(even + 1).method is None
    assert Planner(PROFILE, {"draft": np.array([0.01])}).break_even(8) is None


def test_the_better_drafter_is_chosen() -> None:
    drafts = {"cheap": DraftCost(), "dear": DraftCost(per_level=0.002)}
    profile = Profile("m", "m", "f", PROFILE.verify, drafts)
    acceptance = {"cheap": np.array([0.5]), "dear": np.array([0.9])}
    assert Planner(profile, acceptance).best(1).method == "dear"
    assert Planner(profile, {**acceptance, "cheap": np.array([0.85])}).best(1).method == "cheap"


def test_exports() -> None:
    table = LengthTable({1: 5, 2: 5, 8: 3, 9: 0, 32: 0})
    assert vllm_bands(table, 64) == [[1, 2, 5], [3, 8, 3], [9, 64, 0]]
    assert trtllm_schedule(vllm_bands(table, 64)) == {2: 5, 8: 3}
    always = length_table(Planner(PROFILE, {"draft": np.array([0.99])}, depth=2, chains=True), [1, 2])
    assert vllm_bands(always, 4) == [[1, 4, 2]]
    assert trtllm_schedule([[1, 4, 2]]) == {4: 2}
    assert trtllm_schedule([[1, 4, 0]]) == {1: 0}
    assert trtllm_schedule([[1, 4, 2], [5, 8, 3], [9, 16, 1]]) == {4: 2, 8: 2, 16: 1}


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_profiles_can_be_planned_with(name: str) -> None:
    profile = read_profile(name)
    method = next(iter(profile.drafts))
    assert Planner(profile, {method: np.array([0.8])}).best(1).speedup > 1.2
    assert profile.notes


def test_unknown_profiles_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean h100-llama-8b"):
        read_profile("h100-lama-8b")
