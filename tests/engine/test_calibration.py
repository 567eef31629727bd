"""Costs are measured on the engine itself, which is as new afterwards."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parlay.config import EngineConfig
from parlay.engine import profiles
from parlay.engine.calibration import calibrate, knots_near, shapes
from parlay.engine.engine import Engine
from parlay.engine.profiles import GUESS, LEVEL, profile_for, stored
from parlay.engine.stopwatch import Limits, Shape
from parlay.types import Request, SamplingParams
from tests.architectures import make_model
from tests.drafting import engine_with
from tests.tiny import make_tiny_llama

PROMPTS = [(5, 6, 7, 5, 6, 7, 5), (3, 1, 4, 1, 5, 9, 2, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def outputs(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
        engine.check_integrity()
    return found


@pytest.mark.parametrize("method", ["eagle", "draft_model", "medusa", "self"])
def test_an_engine_is_measured_and_is_as_new(folder: Path, method: str) -> None:
    expected = outputs(engine_with(folder, method))
    engine, shares = engine_with(folder, method), list[float]()
    free, before = engine.scheduler.blocks.num_free, engine.policy
    found = calibrate(engine, "quick", shares.append)
    profile = found.profile
    assert found.shapes > 20
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert float(profile.verify(33, 1, 64)) > 0
    assert float(profile.verify(64, 8, 4000)) >= float(profile.verify(1, 1, 32))
    cost = profile.draft(method)
    assert cost(4, 2, 8, 100) > 0
    assert profile.host(4, 0) > 0
    assert set(profile.drawing) == {method}
    drawing, choosing = profile.sampled(method)
    assert drawing(3, 1, 8, 0) + choosing(3, 1, 8, 0) > 0, "rows that sample draw their guesses"
    assert engine.policy is before
    assert not engine.has_work
    assert 0 <= found.median_error <= found.worst_error
    assert not engine.drafters.failed
    assert engine.scheduler.blocks.num_free == free
    assert outputs(engine) == expected


def test_shapes_stay_within_an_engine() -> None:
    limits = Limits(rows=4, new=40, context=300, pages=60, page_size=16)
    some = shapes(limits, streams=False)
    assert Shape(4, 32, 9) in some
    assert max(shape.rows for shape in some) == 4
    assert max(shape.rows * shape.new for shape in some) <= 40
    assert {shape.context for shape in some} == {32, 256}
    assert all(shape.rows * -(-(shape.context + 9) // 16) <= 60 for shape in some)
    assert shapes(Limits(1, 1, 64, 4, 16), streams=False) == [Shape(1, 32, 1)]
    wide = Limits(rows=4, new=1024, context=2000, pages=500, page_size=16)
    assert {Shape(1, 32, new) for new in (25, 49, 513)} <= {*shapes(wide, streams=True)}, (
        "where layers stream, trees may be large"
    )
    assert Shape(1, 32, 513) not in shapes(wide, streams=False)


def test_a_curve_has_no_knots_where_no_pass_was_timed() -> None:
    """What lies between 34 and 65 tokens is a line, not a step at 48 that nothing tells from one at 64."""
    sizes = [Shape(1, 32, new) for new in (1, 2, 4, 8, 17, 33, 65)] + [Shape(2, 32, 17)]
    assert knots_near(sizes) == [1, 2, 4, 8, 16, 32, 64]
    assert knots_near([Shape(1, 32, 49), *sizes]) == [1, 2, 4, 8, 16, 32, 48, 64]


def test_how_siblings_are_drawn_is_measured_apart(folder: Path) -> None:
    paths = {stored(engine_with(folder, "self", tree_sampling=drawn)) for drawn in ("sequoia", "topk")}
    assert len(paths) == 2


def test_it_is_kept_and_measured_again_where_it_does_not_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path))
    engine = engine_with(folder, "self")
    assert profile_for(engine, "skip") == replace(GUESS, drafts={"self": LEVEL}), "a level is not free"
    found = profile_for(engine, "quick")
    assert stored(engine).is_relative_to(tmp_path)

    def failing(*args: Any) -> Any:
        raise AssertionError("it is measured once")

    with monkeypatch.context() as patch:
        patch.setattr(profiles, "calibrate", failing)
        assert profile_for(engine_with(folder, "self"), "full") == found
        assert profile_for(engine_with(folder, "self"), "skip") == found
        with pytest.raises(AssertionError):
            profile_for(engine_with(folder, "eagle"), "full")
    path = stored(engine)
    path.write_text("{")
    assert profile_for(engine_with(folder, "self"), "skip").notes == GUESS.notes
    assert "is not a profile" in caplog.text
    profile_for(engine_with(folder, "self"), "quick")
    other = json.loads(path.read_text()) | {"hardware": "an abacus"}
    path.write_text(json.dumps(other))
    assert profile_for(engine_with(folder, "self"), "quick").hardware == found.hardware
    assert "was measured on an abacus" in caplog.text


def test_a_context_that_is_too_short_is_not_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(
        str(make_tiny_llama(tmp_path)), device="cpu", max_model_len=24, calibrate="quick", self_check=False
    )
    with caplog.at_level(logging.WARNING):
        engine = Engine(config)
    assert "leaves nothing to measure" in caplog.text
    assert engine.profile is not None
    assert engine.profile.notes == GUESS.notes
