"""Odd drafters, odd clocks and odd policies under a real engine: output stays the model's own, and the log says so."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.engine import laps
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.engine.monitor import Monitor
from parlay.engine.profiles import stored
from parlay.policy.goodput import Goodput
from parlay.types import Offer, Request, Row, SamplingParams
from tests.architectures import make_model, prompts_of

pytestmark = pytest.mark.failures

GREEDY: dict[str, Any] = {"temperature": 0}
CHAIN = Tree.chain(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def new_engine(folder: Path, *drafters: Drafter, **options: Any) -> Engine:
    options = {"self_check": False, "compile": "off", "calibrate": "skip"} | options
    config = EngineConfig(str(folder), dtype="float64", device="cpu", **options)
    return Engine(config, lambda _: Drafters(drafters))


def outputs(engine: Engine, tokens: int = 40, **params: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts_of(5)):
        wish = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True} | (params or GREEDY))
        engine.add(Request(str(number), prompt, wish))
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
        engine.check_integrity()
    return found


class Told(Drafter):
    """Guesses what it is told to."""

    name = "told"

    def __init__(self, guess: Callable[[Row, int], Sequence[int]], offer: dict[str, Any] | None = None) -> None:
        self.guess, self.change = guess, offer or {}

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        return [dataclasses.replace(Offer(self.name, CHAIN), **self.change) for _ in rows]

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int = 0) -> list[Draft | None]:
        return [
            Draft(self.name, bet.tree, tuple(self.guess(row, len(bet.tree))))
            for row, bet in zip(rows, bets, strict=True)
        ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[int]]:
    return outputs(new_engine(folder, speculation=None), 100)


def test_a_drafter_that_guesses_at_random_is_found_out(folder: Path, plain: dict[str, list[int]]) -> None:
    rng = random.Random(0)
    engine = new_engine(folder, Told(lambda row, count: [rng.randrange(60) for _ in range(count)]))
    shares = Monitor(engine)
    assert outputs(engine, 100) == plain
    assert not engine.drafters.failed, "bad guesses are no failure"
    counts = sum((second.shares for second in shares._history), start=type(shares._history[0].shares)())
    assert counts["off"] > 0.5 * counts.total()


def test_a_drafter_that_is_always_right_is_bet_on(folder: Path, plain: dict[str, list[int]]) -> None:
    def knowing(row: Row, count: int) -> list[int]:
        done = row.length - len(row.request.prompt)
        return (plain[row.request.id][done : done + count] + [0] * count)[:count]

    engine = new_engine(folder, Told(knowing))
    shares = Monitor(engine)
    assert outputs(engine, 100) == plain
    tokens, emitting = (sum(getattr(some, name) for some in shares._history) for name in ("tokens", "emitting"))
    assert tokens > 1.5 * emitting


@pytest.mark.parametrize("params", [GREEDY, {"seed": 3}], ids=["greedy", "coupled"])
@pytest.mark.parametrize(
    ("guess", "offer"),
    [
        (lambda row, count: [10**6] * count, None),
        (lambda row, count: [-1] * count, None),
        (lambda row, count: [1] * (count - 1), None),
        (lambda row, count: [1] * count, {"confidence": (0.5, math.nan, 0.1, 0.1)}),
        (lambda row, count: [1] * count, {"confidence": (0.5,)}),
        (lambda row, count: [1] * count, {"confidence": ()}),
        (lambda row, count: [1] * count, {"confidence": (7.0, 0.5, 0.1, 0.1)}),
        (lambda row, count: [1] * count, {"method": "another"}),
    ],
    ids=[
        "beyond the vocabulary",
        "negative",
        "too few",
        "not a number",
        "not for each",
        "for none",
        "beyond reason",
        "misnamed",
    ],
)
def test_a_drafter_that_talks_nonsense_is_switched_off(
    folder: Path,
    guess: Callable[[Row, int], Sequence[int]],
    offer: dict[str, Any] | None,
    params: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = new_engine(folder, Told(guess, offer))
    assert outputs(engine, **params) == outputs(new_engine(folder, speculation=None), **params)
    assert engine.drafters.failed == ("told",)
    assert "drafter told failed and is switched off" in caplog.text


@pytest.mark.parametrize("verb", ["plan", "observe"])
def test_a_policy_that_fails_is_dropped_until_it_is_asked_for(
    folder: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(folder, Told(lambda row, count: [1] * count))
    first, calls = engine.policy, 0
    assert isinstance(first, Goodput)
    honest = getattr(first, verb)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise ZeroDivisionError("of all things")
        return honest(*args)

    setattr(first, verb, failing)
    assert outputs(engine) == outputs(new_engine(folder, speculation=None))
    assert calls == 7
    assert "the policy auto failed: nothing is bet from now on" in caplog.text
    assert engine.policy_name == "off"
    engine.use_policy("auto")
    assert isinstance(engine.policy, Goodput)
    assert engine.policy is not first
    assert outputs(engine) == outputs(new_engine(folder, speculation=None))
    assert engine.policy_name == "auto"


class _Clock:
    """One that jumps now and then."""

    def __init__(self, jump: float) -> None:
        self.jump, self.calls, self.ahead = jump, 0, 0.0

    def perf_counter(self) -> float:
        self.calls += 1
        if self.calls % 101 == 0:
            self.ahead += self.jump
        return time.perf_counter() + self.ahead


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumps_changes_no_output(
    folder: Path,
    plain: dict[str, list[int]],
    jump: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = new_engine(folder, Told(lambda row, count: [1] * count))
    Monitor(engine)
    monkeypatch.setattr(laps, "time", _Clock(jump))
    assert outputs(engine, 100) == plain
    assert engine.policy_name == "auto"
    assert ("the clock jumped" if jump < 0 else "a pass took 3.6e+03 s") in caplog.text


def test_a_profile_that_nobody_can_read_or_of_another_machine_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path))

    def start() -> Engine:
        return new_engine(folder, Told(lambda row, count: [1] * count), calibrate="quick", max_num_seqs=4)

    path = stored(start())
    good = path.read_text()
    written = json.loads(good)
    foreign = written | {"hardware": "an abacus"}
    broken = written | {"verify": written["verify"] | {"seconds": ["soon"]}}
    infinite = written | {"verify": written["verify"] | {"per_row": math.inf}}
    for odd in ("", "{", "[1, 2]", "null", *map(json.dumps, (foreign, broken, infinite, {})), good[: len(good) // 2]):
        caplog.clear()
        path.write_text(odd)
        engine = start()
        assert "so it is measured again" in caplog.text
        assert json.loads(path.read_text())["hardware"] == written["hardware"]
        assert outputs(engine) == outputs(new_engine(folder, speculation=None))
    path.write_bytes(b"\xff\xfe\x00")
    start()
    assert json.loads(path.read_text())["verify"]["knots"]
