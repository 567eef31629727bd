"""Incremental text equals decoding at once, and outputs end where they should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parlay.bets import NO_TREE
from parlay.engine.output import OutputStream
from parlay.engine.tokenizer import Tokenizer
from parlay.types import Delta, Request, RowResult, SamplingParams
from tests.tiny import tiny_tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer(), max_model_len=256)
EOS = TOKENIZER.eos_token_id or 0
PROMPT = tuple(TOKENIZER.encode("Say: "))


def stream(limit: int = 1000, **params: object) -> OutputStream:
    sampling = SamplingParams(max_tokens=None, **params)  # type: ignore[arg-type]
    return OutputStream(Request("r", PROMPT, sampling), 0, TOKENIZER, (EOS,), limit)


def feed(out: OutputStream, tokens: list[int], sizes: list[int]) -> list[Delta]:
    """Hands tokens over in steps of these sizes until the output ends."""
    deltas: list[Delta] = []
    at = 0
    while at < len(tokens) and not (deltas and deltas[-1].finish_reason):
        size = sizes[len(deltas) % len(sizes)]
        deltas.append(out.take(RowResult(None, NO_TREE, (), tuple(tokens[at : at + size]))))
        at += size
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_text_survives_any_split(text: str, sizes: list[int]) -> None:
    """Characters of several bytes come out whole, however tokens are spread over steps."""
    deltas = feed(stream(), [*TOKENIZER.encode(text), EOS], sizes)
    assert text_of(deltas) == text
    assert not any("\ufffd" in delta.text for delta in deltas) or "\ufffd" in text
    assert deltas[-1].finish_reason == "stop"


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abc \u00e9\U0001f600", min_size=1, max_size=30),
    st.lists(st.text(alphabet="abc \u00e9", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
def test_stop_strings_cut_the_text_wherever_they_fall(text: str, stops: list[str], sizes: list[int]) -> None:
    tokens = TOKENIZER.encode(text)
    deltas = feed(stream(stop=tuple(stops)), [*tokens, EOS], sizes)
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    kept = [token for delta in deltas for token in delta.tokens]
    if first is None:
        assert text_of(deltas) == text
        assert kept == [*tokens, EOS]
    else:
        assert text.startswith(text_of(deltas))
        assert not any(stop in text_of(deltas) for stop in stops)
        assert deltas[-1].stop_reason in stops
        assert kept == tokens[: len(kept)]
        whole = TOKENIZER.decode(kept)
        assert any(stop in whole for stop in stops), "kept tokens end with the one that completes a stop string"
        assert not any(stop in TOKENIZER.decode(kept[:-1]) for stop in stops)


def test_a_stop_string_before_min_tokens_is_not_a_stop() -> None:
    tokens = TOKENIZER.encode("abcabc")
    deltas = feed(stream(stop=("b",), min_tokens=4), tokens, [1])
    assert text_of(deltas) == "abca"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_endings(size: int) -> None:
    tokens = TOKENIZER.encode("hello")
    cut = feed(stream(limit=3), tokens, [size])
    assert (cut[-1].finish_reason, sum(len(d.tokens) for d in cut)) == ("length", 3)
    assert text_of(cut) == TOKENIZER.decode(tokens[:3])
    ended = feed(stream(), [*tokens[:2], EOS, *tokens], [size])
    assert (ended[-1].finish_reason, ended[-1].stop_reason) == ("stop", None)
    assert text_of(ended) == TOKENIZER.decode(tokens[:2])
    on = feed(stream(ignore_eos=True, skip_special_tokens=False), [*tokens[:2], EOS, *tokens[2:]], [size])
    assert on[-1].finish_reason is None
    assert text_of(on) == TOKENIZER.decode([*tokens[:2], EOS, *tokens[2:]], skip_special_tokens=False)
    by_id = feed(stream(stop_token_ids=(tokens[1],)), tokens, [size])
    assert (by_id[-1].stop_reason, text_of(by_id)) == (tokens[1], TOKENIZER.decode(tokens[:1]))


def test_an_unfinished_character_is_shown_when_the_output_ends() -> None:
    tokens = TOKENIZER.encode("\U0001f600")[:2]
    assert text_of(feed(stream(limit=2), tokens, [1])) == "\ufffd"


def test_bytes_of_tokens() -> None:
    tokens = TOKENIZER.encode("the \U0001f600!")
    assert bytes(byte for token in tokens for byte in TOKENIZER.token_bytes(token)).decode() == "the \U0001f600!"
