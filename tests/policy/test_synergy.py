from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.policy import synergy
from parlay.policy.cost import VerifyCost
from parlay.policy.synergy import LengthTable


def linear(per_request: float, fixed: float) -> synergy.Callable[[int, np.ndarray], np.ndarray]:
    return lambda batch, guesses: fixed + per_request * batch * guesses


def test_the_illustrated_lengths() -> None:
    """Made-up costs whose optimum is known: a guess of a request 0.2 ms, a pass 20 ms, a draft step 1 ms."""
    found = [
        synergy.best_length(batch, 40, lambda s: synergy.power_law(s, 0.9, 0.548), linear(0.2, 20.0), 1.0)
        for batch in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert found == [13, 10, 7, 5, 2, 1, 1]


@given(
    c=st.floats(0.3, 0.95), g=st.floats(0.2, 0.9), per_request=st.floats(0.001, 2), fixed=st.floats(1, 50),
    draft=st.floats(0, 5), row=st.floats(0, 1),
)  # fmt: skip
def test_more_requests_never_make_longer_guesses_better(
    c: float, g: float, per_request: float, fixed: float, draft: float, row: float
) -> None:
    def verify(batch: int, guesses: np.ndarray) -> np.ndarray:
        return fixed + per_request * batch * guesses

    lengths = [
        synergy.best_length(batch, 24, lambda s: synergy.power_law(s, c, g), verify, draft) for batch in range(1, 65)
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_no_guess_is_a_legal_length() -> None:
    assert synergy.best_length(64, 8, lambda s: synergy.independent(s, 0.2), linear(1.0, 1.0), 0.0) == 0


def test_on_a_staircase_the_best_length_fills_a_step() -> None:
    """A search that stops at the first dip would miss it."""
    stairs = VerifyCost((1, 8, 9, 16, 17, 24), (10.0, 10.0, 14.0, 14.0, 40.0, 40.0))

    def verify(batch: int, guesses: np.ndarray) -> np.ndarray:
        return stairs(batch * (guesses + 1), 0, 0)

    length = synergy.best_length(1, 23, lambda s: synergy.independent(s, 0.95), verify, 0.0)
    assert length == 15
    times = synergy.token_time(1, np.arange(24.0), lambda s: synergy.independent(s, 0.95), verify, 0.0)
    assert times[8] > times[7] > times[15]


@given(st.floats(0.2, 1.2), st.floats(0.1, 1.0))
def test_a_power_law_is_recovered(c: float, g: float) -> None:
    guesses = np.arange(1.0, 9)
    fit = synergy.fit_power_law(guesses, synergy.power_law(guesses, c, g))
    assert fit.parameters == pytest.approx((c, g), abs=1e-3)
    assert fit.error < 1e-3
    assert fit(guesses) == pytest.approx(synergy.power_law(guesses, c, g), abs=5e-3)


@given(st.floats(0.0, 1.0))
def test_independent_acceptance_is_recovered(a: float) -> None:
    guesses = np.arange(1.0, 9)
    fit = synergy.fit_independent(guesses, synergy.independent(guesses, a))
    assert fit.parameters[0] == pytest.approx(a, abs=1e-3)
    assert fit.error <= fit.worst + 1e-9 < 1e-2


def test_the_better_form_has_the_smaller_error() -> None:
    """Runs of accepted guesses longer than independence allows: half of the texts accept all, half nearly nothing."""
    guesses = np.arange(1.0, 13)
    accepted = 0.5 * synergy.independent(guesses, 0.97) + 0.5 * synergy.independent(guesses, 0.1)
    assert synergy.fit_power_law(guesses, accepted).error < synergy.fit_independent(guesses, accepted).error


@pytest.mark.parametrize("guesses", [[], [0.0, 1.0]])
def test_a_fit_needs_measurements_with_guesses(guesses: list[float]) -> None:
    with pytest.raises(ValueError, match="measurements"):
        synergy.fit_power_law(np.array(guesses), np.zeros(len(guesses)))


def test_lines_by_batch_size() -> None:
    guesses = np.arange(5.0)
    lines = synergy.fit_lines(guesses, {1: 20 + 0.2 * guesses, 8: 21 + 1.6 * guesses, 64: np.full(5, 3.0)})
    assert lines[1] == pytest.approx((0.2, 20, 1))
    assert lines[8] == pytest.approx((1.6, 21, 1))
    assert lines[64] == pytest.approx((0, 3, 1))


def test_regret() -> None:
    assert synergy.regret([10.0, 8.0, 8.4], 2) == pytest.approx(0.05)
    assert synergy.regret([10.0, 8.0, 8.4], 1) == 0


def test_a_table_takes_the_next_larger_batch_that_was_profiled() -> None:
    table = LengthTable.measured({4: [3.0, 2.0, 1.0], 1: [5.0, 4.0, 3.0, 2.0], 16: [1.0, 2.0]})
    assert [table[batch] for batch in (1, 2, 4, 5, 16, 400)] == [3, 2, 2, 0, 0, 0]


def test_bands_of_a_table() -> None:
    assert LengthTable({1: 4, 2: 4, 8: 2, 32: 0}).bands() == [(1, 2, 4), (3, 8, 2), (9, None, 0)]
    assert LengthTable({4: 3}).bands() == [(1, None, 3)]


@given(st.dictionaries(st.integers(1, 100), st.integers(0, 8), min_size=1), st.integers(1, 120))
def test_bands_say_what_the_table_says(lengths: dict[int, int], batch: int) -> None:
    table = LengthTable(lengths)
    bands = table.bands()
    assert bands[0][0] == 1
    assert all(before[1] is not None and before[1] + 1 == after[0] for before, after in pairwise(bands))
    assert [length for first, last, length in bands if first <= batch and (last is None or batch <= last)] == [
        table[batch]
    ]


@pytest.mark.parametrize("lengths", [{}, {0: 1}, {1: -1}])
def test_tables_that_are_none(lengths: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="table"):
        LengthTable(lengths)
