"""What the demo makes of replies, and of a server that does not start."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.parity import first_difference
from parlay.bench import demo, environment
from parlay.bench.client import Target
from parlay.bench.load import Load, Reply
from parlay.bench.local_server import ServerFailed, local_server
from parlay.bench.workloads import Prompt
from parlay.types import Speculation
from tests.server.stand_in import StandIn
from tests.serving import MODEL, serving

REPLY = Reply(category="chat", text="a", ttft=0.1, seconds=1.0, tokens=10, steps=10, drafted=0, accepted=0, methods={})


def loads(concurrency: int, off: float, auto: float, text: str = "a") -> list[Load]:
    arms: list[tuple[Speculation, float, Reply]] = [
        ("off", off, REPLY),
        ("auto", auto, replace(REPLY, text=text, steps=5, seconds=auto, methods={"eagle": 4})),
    ]
    return [Load(concurrency, arm, seconds, (reply,)) for arm, seconds, reply in arms]


def test_reading_says_where_it_paid_and_where_it_cost() -> None:
    result = demo.summarise("m", 10, [*loads(1, 1.0, 0.5), *loads(16, 1.0, 1.25, text="b")])
    assert [level.ratio for level in result.levels] == [2.0, 0.8]
    assert "2.00x at 1, 0.80x at 16" in result.reading
    assert "it paid at 1 and cost speed at 16" in result.reading
    assert "1 of 2 greedy texts" in result.reading
    assert result.cells[1].tokens_per_step == 2
    assert [cell.bets for cell in result.cells[:2]] == [{}, {"eagle": 0.8}]
    assert [category.name for category in result.categories] == ["chat"]
    assert json.loads(environment.as_json(environment.capture(), result))["texts_equal"] == 1


def test_reading_lists_every_level() -> None:
    result = demo.summarise("m", 10, [*loads(1, 1.0, 0.5), *loads(4, 1.0, 0.5), *loads(16, 1.0, 0.5)])
    assert "it paid at 1, 4 and 16 and cost speed nowhere" in result.reading


def test_reading_claims_nothing_from_noise() -> None:
    result = demo.summarise("m", 10, [*loads(1, 1.0, 0.98), *loads(4, 1.0, 1.02)])
    assert "no clear difference" in result.reading
    assert "All 2 greedy texts" in result.reading


def test_reading_claims_nothing_where_rounds_disagree() -> None:
    result = demo.summarise(
        "m", 10, [*loads(1, 1.0, 0.5), *loads(1, 1.0, 1.1), *loads(4, 1.0, 0.9), *loads(4, 1.0, 0.8)]
    )
    assert result.levels[0].ratio == pytest.approx(2 / 1.6)
    assert result.levels[0].rounds == pytest.approx((2.0, 1 / 1.1))
    assert "it paid at 4 and cost speed nowhere" in result.reading


def test_both_arms_are_sent_the_same_at_every_level() -> None:
    prompts = [Prompt("a", "one"), Prompt("b", "two"), Prompt("a", "three")]
    levels = (demo.Level(1, 2), demo.Level(2, 3))
    with serving(StandIn(), api_key="sesame") as server:
        found = demo.measure(Target(server.url, MODEL, api_key="sesame"), prompts, levels, 4)
    assert len(found) == demo.ROUNDS * len(levels) * len(demo.ARMS)
    assert [(load.concurrency, load.speculation) for load in found[:8]] == [
        *((1, "off"), (1, "auto"), (2, "off"), (2, "auto")),
        *((1, "auto"), (1, "off"), (2, "auto"), (2, "off")),
    ]
    first = found[0]
    assert [reply.category for reply in first.replies] == ["a", "b"]
    assert [reply.category for reply in found[4].replies] == ["a", "a"]  # goes on where the first round ended
    reply = first.replies[0]
    assert (reply.text, reply.tokens, reply.steps, reply.drafted, reply.accepted) == ("user", 4, 4, 12, 8)
    assert 0 < reply.ttft <= reply.seconds <= first.seconds


def test_a_failed_request_ends_the_demo() -> None:
    with serving(StandIn(), api_key="sesame") as server, pytest.raises(ServerFailed, match="HTTP 404"):
        demo.measure(Target(server.url, "another", api_key="sesame"), [Prompt("a", "one")], (demo.Level(1, 1),), 4)


def test_failed_start_shows_the_log() -> None:
    with pytest.raises(ServerFailed, match=r"status 2:\n(.|\n)*no-such-option"), local_server(["--no-such-option"]):
        pass


def test_environment_names_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/tool", "--dataset", "/data/set.jsonl", "--rows", "4"])
    assert environment.capture().command == "tool --dataset set.jsonl --rows 4"
    monkeypatch.setattr("sys.argv", ["tool", "--drafter", "eagle=/somewhere/else/head", "self=7", "eagle:4"])
    assert environment.capture().command == "tool --drafter eagle=head self=7 eagle:4"


def test_environment_tells_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["parlay", "bench", "--api-key", "secret", "--api-key=secret", "--seed", "4"])
    assert environment.capture().command == "parlay bench --api-key ... --api-key=... --seed 4"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)],
)
def test_first_difference(one: tuple[int, ...], other: tuple[int, ...], expected: int | None) -> None:
    assert first_difference(one, other) == expected
