"""Events from bytes, and what becomes of answers that go wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from parlay.bench.client import Reply, Target, Wish, ask, connect, prepare
from parlay.bench.sse import EventReader
from parlay.bench.workloads import Prompt
from parlay.types import SpeculationStats
from tests.bench.scripted import scripted


def event(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def said(text: str, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, **more}]})


DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_survive_any_cut(size: int) -> None:
    stream = 'data: {"text": "a\u2028é😀"}\r\n\r\n: a comment\n\nevent: x\ndata:one\ndata: two\n\ndata: cut'.encode()
    reader = EventReader()
    events = [e for start in range(0, len(stream), size) for e in reader.feed(stream[start : start + size])]
    assert events == ['{"text": "a\u2028é😀"}'.encode(), b"one\ntwo"]


def reply_to(pieces: list[bytes], *, status: int = 200, whole: bool = True, timeout: float = 30) -> Reply:
    async def go(url: str) -> Reply:
        async with connect() as client:
            request = prepare(client, Target(url, "m"), Wish(8), Prompt("chat", "hi"))
            return await ask(client, request, timeout)

    with scripted(pieces, status=status, whole=whole) as server:
        return asyncio.run(go(server.url))


def test_a_whole_answer() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "speculation": {"steps": 2, "drafted": 5, "accepted": 1}}
    emoji = said("😀")
    reply = reply_to(
        [
            event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None}),
            emoji[:-9],  # in the middle of the character
            emoji[-9:],
            said(" é", finish_reason="length"),
            event({"choices": [], "usage": usage}),
            DONE,
        ]
    )
    assert reply.failure is None
    assert reply.text == "😀 é"
    assert len(reply.chunks) == 2
    assert reply.sent <= reply.chunks[0] <= reply.chunks[1] <= reply.ended
    assert reply.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 3)
    assert reply.usage.speculation == SpeculationStats(2, 5, 1)


def test_plain_texts_and_thoughts_count() -> None:
    thought = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    plain = event({"choices": [{"index": 0, "text": "yes"}]})
    reply = reply_to([thought, plain, DONE])
    assert (reply.text, len(reply.chunks), reply.usage) == ("hmyes", 2, None)


def failures() -> Iterator[Any]:
    body = [json.dumps({"error": {"message": "slow down", "type": "x"}}).encode()]
    yield pytest.param(body, {"status": 429}, "HTTP 429", "slow down", id="429")
    yield pytest.param([b"oops"], {"status": 500}, "HTTP 500", "oops", id="500")
    yield pytest.param([said("a")], {}, "broken stream", r"it ended without \[DONE\]", id="no end")
    yield pytest.param([said("a")], {"whole": False}, "broken stream", ".", id="hangs up")
    yield pytest.param([event({"error": {"message": "broke"}})], {}, "error in stream", "broke", id="error event")
    yield pytest.param([b"data: {oops\n\n"], {}, "unreadable event", "{oops", id="no JSON")
    yield pytest.param([b"data: 3\n\n"], {}, "unreadable event", "3", id="no object")
    yield pytest.param([said("a"), b""], {"timeout": 0.2}, "timeout", "after 0.2 s", id="silence")


@pytest.mark.parametrize(("pieces", "options", "kind", "message"), list(failures()))
def test_failures_have_a_kind_and_a_message(
    pieces: list[bytes], options: dict[str, Any], kind: str, message: str
) -> None:
    failure = reply_to(pieces, **options).failure
    assert failure is not None
    assert failure.kind == kind
    assert re.search(message, failure.message)


def test_nobody_there() -> None:
    async def go() -> Reply:
        async with connect() as client:
            request = prepare(client, Target("http://127.0.0.1:9", "m"), Wish(8), Prompt("chat", "hi"))
            return await ask(client, request, 30)

    failure = asyncio.run(go()).failure
    assert failure is not None
    assert failure.kind == "no connection"


def test_only_what_was_asked_for_is_sent() -> None:
    async def body(target: Target, wish: Wish) -> tuple[str, dict[str, Any], str | None]:
        async with connect() as client:
            request = prepare(client, target, wish, Prompt("chat", "hi"))
            return request.url.path, json.loads(request.content), request.headers.get("authorization")

    plain = {"model": "m", "max_tokens": 8, "temperature": 0.0, "stream": True}
    plain["stream_options"] = {"include_usage": True}
    path, sent, key = asyncio.run(body(Target("http://h", "m"), Wish(8)))
    assert (path, key) == ("/v1/chat/completions", None)
    assert sent == {**plain, "messages": [{"role": "user", "content": "hi"}]}
    target = Target("http://h", "m", "completions", "k")
    path, sent, key = asyncio.run(body(target, Wish(8, ignore_eos=True, speculation="max")))
    assert (path, key) == ("/v1/completions", "Bearer k")
    assert sent == {**plain, "prompt": "hi", "ignore_eos": True, "speculation": "max"}
    assert "k'" not in repr(target)


def test_conversations_need_the_chat_endpoint() -> None:
    async def go() -> None:
        async with connect() as client:
            prompt = Prompt("chat", "hi", ({"role": "system", "content": "be brief"},))
            prepare(client, Target("http://h", "m", "completions"), Wish(8), prompt)

    with pytest.raises(ValueError, match="need --endpoint chat"):
        asyncio.run(go())
