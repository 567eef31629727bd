from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.policy.ppd import Pipeline, simulate


def test_the_known_values() -> None:
    assert Pipeline(40, 30, 1, 0.8).token_time == pytest.approx(32.0)
    assert Pipeline(40, 20, 1, 0.5).token_time == pytest.approx(30.0)
    assert Pipeline(40, 20, 3, 1.0).speedup == pytest.approx(2.0)
    assert Pipeline(40, 30, 3, 0.8).compute == pytest.approx(40 + 2.2 * 10)


@pytest.mark.parametrize("autocorrelation", [0.0, 0.6])
@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline(40, 30, 1, 0.8),
        Pipeline(40, 20, 3, 0.5),
        Pipeline(30, 22, 5, 0.9, fork=1.5, handoff=0.7),
        Pipeline(12, 6, 2, 0.3, handoff=2.0),
    ],
)
def test_the_formulas_agree_with_the_simulation(pipeline: Pipeline, autocorrelation: float) -> None:
    found = simulate(pipeline, 40_000, seed=3, autocorrelation=autocorrelation)
    assert abs(found.token_time - pipeline.token_time) < 1.5 * found.token_time_error
    assert found.busy_units == pytest.approx(pipeline.busy_units, rel=0.01)
    assert found.compute == pytest.approx(pipeline.compute, rel=0.01)
    assert found.matches == pytest.approx(pipeline.p_correct, abs=0.02)


def test_runs_of_matches_make_the_mean_less_certain_and_leave_it_as_it_is() -> None:
    pipeline = Pipeline(40, 25, 2, 0.6)
    single, in_runs = simulate(pipeline, 40_000, 1), simulate(pipeline, 40_000, 1, autocorrelation=0.8)
    assert in_runs.token_time_error > 1.8 * single.token_time_error


@given(st.integers(2, 80), st.floats(0.5, 0.99), st.integers(1, 8), st.floats(0, 1))
def test_bounds(layers: int, share: float, candidates: int, p: float) -> None:
    exit_layer = min(max(int(layers * share), (layers + 1) // 2), layers - 1)
    pipeline = Pipeline(layers, exit_layer, candidates, p)
    assert 1 <= pipeline.speedup <= pipeline.speedup_bound + 1e-9 <= 2 + 1e-9
    assert pipeline.latency(0) == 0
    assert pipeline.latency(1) == layers
    assert 1 <= pipeline.busy_units <= 1 + candidates
    assert pipeline.compute >= layers - 1e-9


@given(st.floats(0.05, 1), st.floats(0, 3))
def test_at_break_even_nothing_is_gained(p: float, other: float) -> None:
    free = Pipeline(40, 28, 2, p, handoff=other)
    assert dataclasses.replace(free, fork=free.break_even_fork).speedup == pytest.approx(1)
    forked = Pipeline(40, 28, 2, p, fork=other * p)
    assert dataclasses.replace(forked, handoff=forked.break_even_handoff).speedup == pytest.approx(1)


def test_no_handoff_is_cheap_enough_without_matches() -> None:
    assert Pipeline(40, 28, 2, 0.0).break_even_handoff == 0
    assert Pipeline(40, 28, 2, 0.1, fork=9).break_even_handoff == 0


@pytest.mark.parametrize(
    "wrong", [{"exit_layer": 4}, {"exit_layer": 10}, {"candidates": 0}, {"p_correct": 1.1}, {"fork": -1}]
)
def test_what_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pipeline(**({"layers": 10, "exit_layer": 7, "candidates": 1, "p_correct": 0.5} | wrong))
