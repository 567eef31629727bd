"""What clients meet when engines break, keys are wrong, connections end: with a stand-in that does so on demand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, engine_threads, serving, until


@pytest.fixture
def engine() -> StandIn:
    return StandIn(paced=True)


@pytest.fixture
def server(engine: StandIn) -> Iterator[Server]:
    with serving(engine, max_body_bytes=2**16) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def pace(engine: StandIn, steps: int = 1) -> None:
    assert engine.pace is not None
    engine.pace.release(steps)


def test_a_stream_ends_with_an_error_when_the_engine_fails(
    engine: StandIn, client: openai.OpenAI, http: httpx.Client
) -> None:
    pace(engine)
    stream = iter(client.completions.create(model=MODEL, prompt="abc", stream=True))
    assert next(stream).choices[0].text == "a"
    engine.breaks = RuntimeError("out of luck")
    pace(engine)
    with pytest.raises(openai.APIError, match="RuntimeError: out of luck") as caught:
        next(stream)
    assert caught.value.code == "engine_failed"
    assert http.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="abc")


def test_all_in_flight_fail_when_the_engine_fails(engine: StandIn, server: Server) -> None:
    failures: list[openai.InternalServerError] = []

    def ask() -> None:
        with server.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        failures.append(caught.value)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(engine.live) == 3)
    engine.breaks = MemoryError("too much")
    pace(engine)
    for thread in threads:
        thread.join()
    assert [failure.type for failure in failures] == ["server_error"] * 3


def test_a_request_that_breaks_admission_fails_alone(
    engine: StandIn, client: openai.OpenAI, http: httpx.Client
) -> None:
    engine.breaks_on_add = TypeError("odd")
    with pytest.raises(openai.InternalServerError, match="odd"):
        client.completions.create(model=MODEL, prompt="abc")
    pace(engine, 3)
    assert client.completions.create(model=MODEL, prompt="abc", max_tokens=3).choices[0].text == "abc"
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted(engine: StandIn, server: Server, stream: bool) -> None:
    body = b'{"prompt": "abc", "max_tokens": 100, "stream": %s}' % (b"true" if stream else b"false")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        until(lambda: bool(engine.live))
    until(lambda: bool(engine.aborted))
    assert not engine.live


def test_a_stopping_server_lets_answers_finish(engine: StandIn) -> None:
    before = engine_threads()
    with serving(engine) as server, server.client() as client:
        stream = iter(client.completions.create(model=MODEL, prompt="abc", max_tokens=3, stream=True))
        pace(engine)
        text = next(stream).choices[0].text
        server.stop()
        pace(engine, 2)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == "abc"
    assert engine_threads() == before


def test_a_stopping_server_does_not_wait_for_ever(engine: StandIn) -> None:
    body = {"prompt": "abc", "max_tokens": 100}
    whole: list[httpx.Response] = []
    with serving(engine, grace=0.2) as server, server.http() as http:
        waiting = threading.Thread(
            target=lambda: whole.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))
        )
        waiting.start()
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            until(lambda: len(engine.live) == 2)
            pace(engine)
            lines = filter(None, answer.iter_lines())
            assert '"text":"a"' in next(lines)
            server.stop()
            (last,) = lines  # and no [DONE]
        waiting.join()
    error = {"message": "the server is shutting down", "type": "server_error", "param": None, "code": "shutting_down"}
    assert json.loads(last.removeprefix("data: ")) == {"error": error}
    assert (whole[0].status_code, whole[0].json()) == (503, {"error": error})
    assert len(engine.aborted) == 2


def test_the_key(engine: StandIn) -> None:
    with serving(engine, api_key="sesame") as server, server.http() as http:
        assert http.get("/health").status_code == 200
        with server.client("sesame") as client:
            assert client.models.list().data[0].id == MODEL
        with server.client("open") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        for shown in (b"", b"sesame", b"Basic sesame", b"Bearer s\xe9same"):
            answer = http.post("/v1/completions", headers={b"Authorization": shown}, json={"prompt": "x"})
            assert answer.status_code == 401


def test_the_form_of_events(engine: StandIn, http: httpx.Client) -> None:
    pace(engine, 2)
    body: dict[str, Any] = {"prompt": "hé", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"usage":null' in events[0]
    assert '"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5' in events[-3]
    assert (
        '"speculation":{"steps":2,"drafted":6,"accepted":4,"methods":{"parrot":{"steps":2,"drafted":6,"accepted":4}}}'
        in events[-3]
    )


def test_logprobs_that_json_cannot_hold(engine: StandIn, client: openai.OpenAI) -> None:
    pace(engine, 3)
    answer = client.completions.create(model=MODEL, prompt="é", max_tokens=3, logprobs=1)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xc3"]
    assert (scores.top_logprobs or [])[0] == {"bytes:\\xc3": -0.5, "\x00": -9999.0}
