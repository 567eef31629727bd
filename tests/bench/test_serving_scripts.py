"""The arithmetic of the benchmarks of serving: loads, Synergy's model of a running engine, and replays."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.replay import Line, latencies
from benchmarks.serving import CODE, PROSE, SHIFTS, Answered, Run, loads, regret, summarise
from benchmarks.synergy import LENGTHS, Cell, Study, crossed, forced, model
from parlay.bench.workloads import Prompt
from parlay.bets import Tree
from parlay.engine.batch import Draft
from parlay.types import Request, Row, SamplingParams

PROMPTS = [Prompt(category, f"{category} {number}") for number in range(20) for category in (*CODE, *PROSE, "qa")]


def test_loads_are_the_same_for_every_policy_and_change_half_way() -> None:
    options = Namespace(requests=8, shares=(0.5, 1.0), shifts=True)
    found = list(loads(options, PROMPTS, 2.0, 3))
    assert found == list(loads(options, PROMPTS, 2.0, 3))
    assert [load.name for load in found] == ["0.5", "1", *SHIFTS]
    assert all(len(load.prompts) == len(load.times) == 8 for load in found)
    assert all(list(load.times) == sorted(load.times) for load in found)
    assert not {*found[0].prompts} & {*found[1].prompts}
    rate, text = found[2:]
    before, after = rate.times[3] - rate.times[0], rate.times[7] - rate.times[4]
    assert before > 2 * after
    assert {prompt.category for prompt in text.prompts[:4]} <= {*CODE}
    assert {prompt.category for prompt in text.prompts[4:]} <= {*PROSE}


def test_policies_are_compared_request_by_request() -> None:
    plain = tuple(Answered(2.0, 0.5, 10, 10, f"{number}") for number in range(6))
    fast = (*(replace(some, latency=1.0, steps=5) for some in plain[1:]), replace(plain[0], latency=1.0, steps=5))
    found = {line.policy: line for line in summarise([Run("1", 0, "off", plain), Run("1", 0, "auto", fast)])}
    assert found["auto"].over_off is not None
    assert found["auto"].over_off.value == 2.0
    assert (found["auto"].tokens_per_step, found["off"].tokens_per_step) == (2.0, 1.0)
    assert (found["auto"].equal, found["off"].equal) == (0, 6)
    result = Namespace(lines=tuple(found.values()))
    assert list(regret(result)) == [("1", -0.5)]  # pyright: ignore[reportArgumentType]


def cells(batches: tuple[int, ...], right: float, per_guess: float, draft: float) -> list[Cell]:
    """What independent guesses would show on a machine whose passes are lines."""
    found = []
    for batch in batches:
        for length in LENGTHS:
            accepted = sum(right**level for level in range(1, length + 1))
            verify = 0.010 + per_guess * batch * length
            step = verify + draft * length + 0.001
            found.append(Cell(batch, length, step / (1 + accepted), accepted, verify, draft * length))
    return found


def test_a_machine_of_the_models_own_kind_is_predicted() -> None:
    batches = (1, 4, 16)
    some = cells(batches, 0.7, 0.0004, 0.0002)
    fits, lines, choices = model(some, batches)
    assert fits["independent"][0][0] == pytest.approx(0.7, abs=1e-3)
    assert min(lines.values()) == pytest.approx(1)
    assert [choice.best for choice in choices] == sorted((choice.best for choice in choices), reverse=True)
    assert choices[0].best > choices[-1].best
    for choice in choices:
        assert choice.chosen["independent"][1] < 0.02, "lengths in between were not measured"
        times = {cell.length: cell.per_token for cell in some if cell.batch == choice.batch}
        assert choice.best == min(times, key=lambda length: times[length])
        assert choice.speedup == times[0] / times[choice.best]


def test_a_table_of_another_task_costs_what_it_costs_there() -> None:
    studies = []
    for name, right in (("all", 0.5), ("easy", 0.9), ("hard", 0.1)):
        some = cells((1, 16), right, 0.0004, 0.0002)
        studies.append(Study(name, tuple(some), *model(some, (1, 16))))
    found = dict(crossed(studies))
    assert set(found) == {"profiled on easy, used for hard", "profiled on hard, used for easy"}
    easy, hard = ({(cell.batch, cell.length): cell.per_token for cell in study.cells} for study in studies[1:])
    best = min(LENGTHS, key=lambda length: easy[1, length])
    worse = hard[1, best] / min(hard[1, length] for length in LENGTHS) - 1
    assert found["profiled on easy, used for hard"][1] == worse > 0


@pytest.mark.parametrize("right", [0.0, 0.4, 1.0])
def test_forced_guesses_are_right_as_often_as_they_should_be(right: float) -> None:
    text, chance = tuple(range(100, 160)), random.Random(0)
    known = array("i", [1, 2, 3, *text[:10]])
    row = Row(1, Request("a", (1, 2, 3), SamplingParams()), 0, known, 13, 12, 1, 0, 8, [1])
    hits = tries = 0
    for _ in range(500):
        draft = forced(Draft("d", Tree.chain(4), (9, 9, 9, 9)), row, text, right, chance)
        hits += sum(a == b for a, b in zip(draft.tokens, text[10:14], strict=True))
        tries += len(draft.tokens)
    assert tries == 2000
    assert hits / tries == pytest.approx(right, abs=0.03)


def test_latencies_are_read_from_a_recording(tmp_path: Path) -> None:
    entries = [
        {"parlay_recording": 1},
        {"arrival": 1.0, "finish": 3.5},
        {"arrival": 2.0, "finish": 3.0},
        {"profile": 0},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    assert list(latencies(path)) == [2.5, 1.0]
    assert Line("auto", 2.0, 2.2).error == pytest.approx(0.1)
