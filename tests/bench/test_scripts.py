"""The arithmetic and the order of turns of the benchmark scripts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.lookup_speed import Answer, LookupSpeed, Pair, gain, show

SHORT = Answer(first=1.0, whole=1.0, first_tokens=1, tokens=(5,), steps=1)
OFF = Answer(first=1.0, whole=5.0, first_tokens=1, tokens=(5, 6, 7, 8, 9), steps=5)
GUESSED = Answer(first=1.0, whole=3.0, first_tokens=1, tokens=(5, 6, 7, 8, 9), steps=2)


def test_a_category_that_only_made_first_tokens_tells_nothing_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    found = gain("short", [Pair("short", 3, SHORT, SHORT)])
    assert (found.decode_off, found.decode_guessed, found.decode_ratio, found.median_ratio) == (None,) * 4
    assert (found.whole_ratio, found.equal_outputs) == (1.0, 1)
    show(LookupSpeed("tiny", "float32", "set", 8, 1, (found,), ()))
    assert "no request went on after its first tokens" in capsys.readouterr().out


def test_decoding_is_what_came_after_the_first_tokens() -> None:
    found = gain("both", [Pair("both", 3, OFF, GUESSED), Pair("both", 3, SHORT, SHORT)])
    assert (found.decode_off, found.decode_guessed, found.decode_ratio, found.median_ratio) == (1.0, 2.0, 2.0, 2.0)


def test_every_peer_goes_first_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "peers"))
    compare: Any = importlib.import_module("benchmarks.peers.compare")
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(compare, "take_turn", lambda worker, prompts, _: asked.append((len(prompts), worker.about)))
    workers = [SimpleNamespace(about=name) for name in "ab"]
    turns = compare.take_turns(workers, [(1,)] * 2, (1, 2), 8, 2)
    assert {place: len(found) for place, found in turns.items()} == {(w, b): 2 for w in "ab" for b in (1, 2)}
    assert sorted(asked[:: len(workers)]) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
