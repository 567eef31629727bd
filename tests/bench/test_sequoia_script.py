"""What `benchmarks/sequoia.py` compares, and the arithmetic of regret."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sequoia import split
from benchmarks.sequoia_trees import (
    GRID,
    OFF,
    SEQUOIA,
    Machine,
    Predictions,
    Program,
    Regret,
    Setting,
    Turns,
    competitors,
    grid,
    machines,
)
from parlay.bench.workloads import Prompt
from parlay.bets import NO_TREE, Tree
from parlay.policy.cost import DraftCost, Profile, VerifyCost
from parlay.policy.planner import Planner
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import kary
from tests.tiny import make_tiny_llama

IN_MEMORY, OFFLOADED = machines(1 << 20)
MATRIX = np.array([[0.6, 0.2], [0.5, 0.1]])


def test_how_settings_are_written() -> None:
    assert Setting.read("0.6") == Setting(0.6)
    assert str(Setting.read("1/0.9")) == "temperature 1, top-p 0.9"
    for wrong in ("", "warm", "-1", "1/0", "1/"):
        with pytest.raises(argparse.ArgumentTypeError, match="TEMPERATURE"):
            Setting.read(wrong)


def test_acceptance_is_measured_on_other_prompts() -> None:
    prompts = [Prompt("a", str(number)) for number in range(8)]
    assert split(prompts, 3, 2) == (prompts[3:5], prompts[:3])
    assert split(prompts, None, 99) == (prompts[4:], prompts[:4])
    for limit in (1, 8):
        with pytest.raises(SystemExit, match="--limit"):
            split(prompts, limit, 4)


def test_the_planned_tree_is_drawn_in_two_ways_where_there_is_chance() -> None:
    planned = kary(2, 2)
    sampled, greedy = (competitors(IN_MEMORY, Setting(heat), planned) for heat in (0.6, 0.0))
    assert [program.name for program in sampled[:3]] == ["off", "Sequoia 6x2", "top-k 6x2"]
    assert [one for one in sampled if one not in greedy] == [sampled[2]]
    assert all(program.is_predicted(Setting(0.0)) for program in greedy)
    assert {program.sampling for program in sampled if not program.is_predicted(Setting(0.6))} == {"specinfer", "topk"}
    nothing = competitors(OFFLOADED, Setting(0.6), NO_TREE)
    assert (nothing[1].name, nothing[2].name) == ("Sequoia 0x0", "chain of 4")


def test_the_planned_tree_is_one_of_the_grid() -> None:
    best = OptimalTrees(MATRIX, 8, 4)
    planned = Program("planned", SEQUOIA, best.tree(4, 2))
    found = grid(best, [(2, 1), (4, 2), (4, 3), (4, 4)], planned)  # a fourth level is worth nothing
    assert found[1] is planned
    assert [program.name for program in (found[0], *found[2:])] == ["grid 2x1", "grid 4x3"]
    assert {program.family for program in found} == {GRID, SEQUOIA}


def test_luck_does_not_choose_what_is_timed_on_it() -> None:
    """Either of two trees is fast on one half of the prompts only, and the planned one is a little faster than both."""
    lucky = np.array([[20.0, 10, 1], [10, 10, 1]] * 4)
    planned = np.array([[16.0, 10, 1]] * 8)
    found = Regret.of(planned, {"a": lucky, "b": lucky[::-1]})
    assert found.crossed.value == pytest.approx(1 - 16 / 10)
    assert found.luckiest.value == pytest.approx(1 - 16 / 15)
    slow = Regret.of(planned, {"a": planned * [0.5, 1, 1], "b": planned * [1.25, 1, 1]})
    assert slow.fastest == "b"
    assert slow.crossed.value == slow.luckiest.value == pytest.approx(0.2)
    assert slow.crossed.low == pytest.approx(0.2)


def test_programs_answer_in_turn_and_are_predicted(tmp_path: Path) -> None:
    """A drafter that is always right emits a token a level and one more, without a step that is cut short."""
    folder = str(make_tiny_llama(tmp_path))
    drafter = [f"draft_model={folder}"]
    options = argparse.Namespace(
        model=folder, dtype="float32", drafter=drafter, method="draft_model", concurrency=1, max_tokens=12
    )
    machine = Machine("tiny", 8, (2,), (), (), {"compile": "off"})
    setting = Setting(0.0)
    programs = [Program(OFF, OFF), Program("tree", SEQUOIA, kary(2, 2)), Program("chain", "chain", Tree.chain(3))]
    prompts = [Prompt("a", text) for text in ("one", "two", "three")]
    times = Turns(options, machine, programs, prompts).take(programs, setting, lambda: None)
    for name, each in (("off", 1), ("tree", 3), ("chain", 4)):
        tokens, steps, seconds = times[name].sum(axis=0)
        assert tokens == each * steps
        assert seconds > 0
    profile = Profile("", "", "", VerifyCost.linear(0.9, 0.1), {"draft_model": DraftCost(per_level=0.5)})
    right = np.array([[1.0]])
    predict = Predictions("draft_model", Planner(profile, {"draft_model": right}, size=8), right)
    off, tree, chain = (predict.line(program, setting, times, "tree") for program in programs)
    assert (off.predicted_over_off, off.over_off.value, tree.sequoia_over_this.value) == (1, 1, 1)
    assert (tree.predicted_step, tree.predicted_tokens) == (pytest.approx(0.9 + 0.7 + 1.0), 3)
    assert chain.predicted_over_off == pytest.approx(4 / (0.9 + 0.4 + 1.5))
    assert chain.tokens_per_step.value == 4
