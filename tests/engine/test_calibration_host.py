"""What steps take beside their passes: fits of times that are known, and runs on engines that allow little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parlay.engine.calibration_host import Kind, Took, fitted, plain_costs, time_host
from parlay.policy.cost import DraftCost, HostCost
from tests.architectures import make_model
from tests.drafting import engine_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def test_what_is_paid_once_is_not_paid_by_every_row() -> None:
    greedy = {Kind(1, 0, 0): Took(0.0, 0.0011), Kind(4, 0, 0): Took(0.0, 0.0014)}
    sampled = {Kind(1, 0, 0): Took(0.0, 0.0016), Kind(4, 0, 0): Took(0.0, 0.0025)}
    host, sampling = plain_costs(greedy, sampled, 1e-6)
    assert (host.per_step, host.per_row, host.per_guess) == pytest.approx((0.0010, 0.0001, 1e-6))
    assert (sampling.per_step, sampling.per_row) == pytest.approx((0.0003, 0.0002))
    assert plain_costs({}, {}, 1e-6) == (HostCost(per_guess=1e-6), HostCost()), "nothing was timed"
    _, sampling = plain_costs(greedy, {Kind(1, 0, 0): sampled[Kind(1, 0, 0)]}, 0.0)
    assert sampling(1, 0) == pytest.approx(0.0005), "of one row alone"


def test_costs_are_found_again() -> None:
    cost = DraftCost(0.001, 0.0005, 0.0002, 0.0001)
    kinds = [Kind(rows, levels, rows * size) for rows in (1, 4) for levels, size in ((1, 1), (4, 4), (3, 8))]
    found = fitted([(kind, cost(kind.levels, kind.rows, kind.guesses, 0)) for kind in kinds])
    assert (found.per_step, found.per_level, found.per_row, found.per_guess) == pytest.approx(
        (0.001, 0.0005, 0.0002, 0.0001)
    )
    assert fitted([]) == DraftCost()


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_seqs": 4, "max_num_batched_tokens": 5},
        {"max_num_seqs": 4, "max_model_len": 48},
    ],
)
def test_engines_that_allow_little_are_measured_and_left_as_they_were(folder: Path, options: dict[str, Any]) -> None:
    engine, shares = engine_with(folder, "eagle", **options), list[float]()
    before, free = engine.policy, engine.scheduler.blocks.num_free
    found = time_host(engine, engine.config.max_num_seqs, 1e-6, ["eagle", "never on offer"], 60.0, shares.append)
    assert found.host(1, 0) > 0
    assert found.drawing["never on offer"] == DraftCost()
    assert shares == [0.5, 1.0]
    assert engine.policy is before
    assert not engine.has_work
    engine.check_integrity()
    engine.forget_answers()
    assert engine.scheduler.blocks.num_free == free


def test_nothing_is_begun_when_time_is_up(folder: Path) -> None:
    found = time_host(engine_with(folder, "eagle"), 2, 1e-6, ["eagle"], -1.0, lambda share: None)
    assert found.drawing == {"eagle": DraftCost()}
    assert found.choosing == DraftCost()
    assert found.host(1, 0) > 0
