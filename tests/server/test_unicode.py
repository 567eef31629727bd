"""Characters of many bytes and many code points, through byte-level tokens, steps of any length and event streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from parlay.config import EngineConfig
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.engine.model import Scores
from parlay.types import Row
from tests.serving import MODEL, Server, serving
from tests.tiny import make_tiny_llama

TEXTS = {
    "emoji": "ok 😀🎉 fine 🚀!",
    "joined": "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽.",
    "cjk": "漢字とかな、한국어。",
    "combining": "e\u0301a\u0308 n\u0303 \u0e01\u0e33 \u0915\u094d\u0937",
    "mixed": "a😀漢e\u0301 the ß the é",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A real engine whose model says its prompt again and again; prompt lookup soon guesses that."""
    folder: Path = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    engine = Engine(EngineConfig(str(folder), dtype="float32", device="cpu", self_check=False))
    verify = engine.model.verify

    def parrot(rows: list[Row], drafts: list[Draft | None], *rest: Any) -> Scores:
        scores = verify(rows, drafts, *rest)
        logits = torch.zeros_like(scores.logits)
        for row, draft, first in zip(rows, drafts, scores.first_read, strict=True):
            if first >= 0:
                depths = (0, *(draft.tree.depths if draft else ()))
                for line, depth in enumerate(depths, start=first):
                    logits[line, row.request.prompt[(row.length + depth) % len(row.request.prompt)]] = 50
        return replace(scores, logits=logits)

    engine.model.verify = parrot  # type: ignore[method-assign]
    return engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with serving(engine) as running:
        yield running


def call(engine: Engine, text: str, **options: Any) -> dict[str, Any]:
    """Asks for the text twice over."""
    length = 2 * len(engine.tokenizer.encode(text))
    return {"model": MODEL, "prompt": text, "max_tokens": length, "temperature": 0, **options}


@pytest.mark.parametrize("speculation", ["off", "suffix:4"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_streams_pass_on_whole_characters(client: openai.OpenAI, engine: Engine, text: str, speculation: str) -> None:
    wish = call(engine, text, extra_body={"speculation": speculation})
    assert len(engine.tokenizer.encode(text)) > len(text), "tokens must split characters"
    answer = client.completions.create(**wish)
    assert answer.choices[0].text == text * 2
    assert answer.usage is not None
    assert ((answer.usage.model_extra or {})["speculation"]["accepted"] > 0) == (speculation == "suffix:4")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**wish, stream=True)]
    assert "".join(pieces) == text * 2
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("speculation", ["off", "suffix:4"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_stop_strings_are_found_across_chunks(
    client: openai.OpenAI, engine: Engine, text: str, speculation: str
) -> None:
    """Every stop string of two code points, whatever tokens and steps it is spread over."""
    for at in range(1, len(text) - 1, 4):
        stop = text[at : at + 2]
        wish = call(engine, text, stop=[stop, "never"], extra_body={"speculation": speculation})
        expected = text[: text.index(stop)]
        (choice,) = client.completions.create(**wish).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        chunks = [chunk.choices[0] for chunk in client.completions.create(**wish, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"
        assert (chunks[-1].model_extra or {})["stop_reason"] == stop


def test_a_character_cut_off_by_the_limit_is_shown_as_broken(client: openai.OpenAI) -> None:
    wish: dict[str, Any] = {"model": MODEL, "prompt": "😀", "max_tokens": 6, "temperature": 0}
    assert client.completions.create(**wish).choices[0].text == "😀\ufffd"
    chunks = [chunk.choices[0].text for chunk in client.completions.create(**wish, stream=True)]
    assert "".join(chunks) == "😀\ufffd"
