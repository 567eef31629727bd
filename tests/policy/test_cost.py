from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from parlay.policy.cost import (
    DraftCost,
    HostCost,
    Profile,
    VerifyCost,
    fit_verify,
    nonnegative_least_squares,
    relative_errors,
)

PROFILE = Profile(
    hardware="a machine",
    model="a model",
    dtype="bfloat16",
    verify=VerifyCost((1, 8, 16), (0.012, 0.017, 0.025), 1e-5, 1e-8),
    drafts={"draft_model": DraftCost(per_level=0.002, per_guess=1e-5), "prompt_lookup": DraftCost()},
    host=HostCost(per_row=2e-5),
    sampling=HostCost(1e-4, 1e-6),
    drawing={"draft_model": DraftCost(per_row=1e-4)},
    choosing=DraftCost(per_step=1e-3, per_guess=1e-4),
    notes="made up",
)


def test_a_pass_takes_no_less_than_its_least() -> None:
    """Even with the published negative share of a row."""
    cost = VerifyCost.linear(0.007, 0.00002, per_row=-0.00004)
    assert float(cost(1000, 1000, 0)) == 0.007
    assert float(cost(1000, 10, 0)) == pytest.approx(0.007 + 0.02 - 0.0004)
    with pytest.raises(ValueError, match="finite"):
        VerifyCost.linear(0.007, math.inf)


def test_a_curve_runs_through_its_knots_and_on_along_its_last_line() -> None:
    cost = VerifyCost((1, 8, 16), (10.0, 10.0, 18.0), per_row=1.0, per_context=0.5)
    assert cost(np.array([1, 4, 8, 12, 16, 24]), 0, 0).tolist() == [10, 10, 10, 14, 18, 26]
    assert cost(8, 2, 4) == pytest.approx(14)
    assert VerifyCost.linear(3.0, 2.0)(np.array([0, 1, 7]), 0, 0).tolist() == [3, 5, 17]
    assert VerifyCost((5,), (2.0,))(np.array([1, 5, 50]), 0, 0).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("knots", "seconds"), [((), ()), ((1, 1), (1.0, 2.0)), ((2, 1), (1.0, 2.0)), ((1,), (1.0, 2.0))]
)
def test_curves_that_are_none(knots: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="knots"):
        VerifyCost(knots, seconds)


def test_a_draft_costs_what_its_parts_cost() -> None:
    cost = DraftCost(1.0, 10.0, 100.0, 1000.0, 0.5)
    assert cost(2, 3, 4, 6) == 1 + 20 + 300 + 4000 + 3
    assert HostCost(1.0, 2.0, 3.0)(4, 5) == 1 + 8 + 15
    assert PROFILE.draft("unheard of")(4, 4, 4, 4) == 0
    assert (cost + cost.scaled(2.0))(2, 3, 4, 6) == pytest.approx(3 * cost(2, 3, 4, 6))


def test_rows_that_sample_cost_more() -> None:
    assert PROFILE.around(4, 0, 0) == PROFILE.host(4, 0) == pytest.approx(8e-5)
    assert PROFILE.around(4, 0, 3) == pytest.approx(8e-5 + 1e-4 + 3e-6)
    cost = DraftCost(1.0, 10.0, 100.0, 1000.0, 0.5)
    assert cost.shared(0.25)(2, 4, 8, 16) == 1 + 20 + 100 + 2000 + 2, "a level takes as long for one row as for many"


def test_a_file_without_costs_of_sampling_is_one_where_it_costs_nothing(tmp_path: Path) -> None:
    PROFILE.save(path := tmp_path / "profile.json")
    written = json.loads(path.read_text())
    for part in ("sampling", "drawing", "choosing"):
        del written[part]
    found = Profile.of(written)
    assert found.sampled("draft_model") == (DraftCost(), DraftCost())
    assert found.around(4, 0, 4) == PROFILE.host(4, 0)


def test_only_guesses_that_are_drawn_are_chosen_among() -> None:
    drawing, choosing = PROFILE.sampled("draft_model")
    assert (drawing(1, 2, 3, 0), choosing(1, 2, 3, 0)) == pytest.approx((2e-4, 1.3e-3))
    assert PROFILE.sampled("prompt_lookup") == (DraftCost(), DraftCost())


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE
    assert PROFILE.key == "a machine a model bfloat16"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"verify": {"knots": [1]}}',
        '{"verify": 3}',
        '{"verify": {"knots": [2, 1], "seconds": [1, 1]}}',
        "\udcff",
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"profile\.json is not a profile"):
        Profile.load(path)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 20))
def test_least_squares_agree_with_scipy(seed: int, unknowns: int, equations: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(equations, unknowns)), rng.normal(size=equations)
    mine = nonnegative_least_squares(a, b)
    assert (mine >= 0).all()
    assert np.linalg.norm(a @ mine - b) == pytest.approx(nnls(a, b)[1], abs=1e-8)


def test_collinear_measurements_do_not_make_more_rows_cheaper() -> None:
    """Rows and new tokens that always grow together led the published fit to a negative price of a row."""
    rng = np.random.default_rng(1)
    rows = rng.integers(1, 64, 200)
    new, context = rows * 5, rows * 200
    seconds = (0.01 + 1e-4 * new) * rng.lognormal(0, 0.05, 200)
    fit = fit_verify(new, rows, context, seconds, [64, 320])
    assert fit.cost.per_row >= 0
    assert fit.cost.per_context >= 0
    assert fit.median_error < 0.06


def test_a_staircase_is_found_from_noisy_measurements_of_other_shapes() -> None:
    rng = np.random.default_rng(0)

    def machine(new: np.ndarray, rows: np.ndarray, context: np.ndarray) -> np.ndarray:
        return 0.010 + 0.004 * np.ceil(new / 16) + 2e-5 * rows + 3e-8 * context

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = rng.integers(1, 33, count)
        return rows * rng.integers(1, 6, count), rows, rows * rng.integers(10, 2000, count)

    shapes = draw(400)
    seconds = machine(*shapes) * rng.lognormal(0, 0.02, 400)
    steps = [edge for step in range(16, 161, 16) for edge in (step, step + 1)]
    fit = fit_verify(*shapes, seconds, steps)
    assert (np.diff(fit.cost.seconds) >= 0).all()
    held_out = draw(200)
    median, worst = relative_errors(fit.cost, *held_out, machine(*held_out))
    straight = fit_verify(*shapes, seconds, [160])
    assert median < 0.01
    assert worst < 0.08
    assert median < 0.5 * relative_errors(straight.cost, *held_out, machine(*held_out))[0]


@given(new=st.integers(0, 500), rows=st.integers(1, 9), context=st.integers(0, 5000))
def test_one_pass_costs_what_it_costs_among_many(new: int, rows: int, context: int) -> None:
    for cost in (VerifyCost((1, 4, 9, 64), (0.01, 0.02, 0.021, 0.05), 1e-4, 1e-6), VerifyCost((3,), (0.01,), -1e-3)):
        assert cost.at(new, rows, context) == pytest.approx(float(cost(new, rows, context)))
