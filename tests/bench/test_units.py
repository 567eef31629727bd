"""What a layer takes, found from steps that run more or fewer of them."""

from __future__ import annotations

import pytest

from parlay.bench.units import _per_layer, _Step


def steps(exit: int, begun: int, count: int, slow: float = 0.0) -> list[_Step]:
    return [_Step(exit=0.5 + 0.25 * (exit - begun) + slow, rest=1, handoff=0, host=0, begun=begun, reached=0)] * count


def test_layers_that_were_begun_are_not_counted() -> None:
    assert _per_layer({(4, 1): steps(4, 0, 3) + steps(4, 2, 5), (6, 1): steps(6, 3, 2)}) == pytest.approx(0.25)


def test_every_step_may_have_had_a_head_start() -> None:
    assert _per_layer({(4, 3): steps(4, 2, 5), (6, 3): steps(6, 3, 5)}) == pytest.approx(0.25)


def test_one_number_of_layers_says_but_the_mean() -> None:
    assert _per_layer({(4, 3): steps(4, 2, 5)}) == pytest.approx(0.5)


def test_a_slow_moment_counts_for_as_little_as_it_lasted() -> None:
    some = {(4, 1): steps(4, 0, 400), (8, 1): steps(8, 0, 400), (9, 1): steps(9, 0, 1, slow=1.0)}
    assert _per_layer(some) == pytest.approx(0.25, rel=0.05)
