"""Routes and bodies, below what OpenAI's client lets through."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from parlay import __version__
from tests.serving import Server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/x", 404)],
)
def test_wrong_routes(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}


def test_a_body_that_is_no_json(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=b"{")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not valid JSON: ")


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_a_body_of_unknown_length_above_the_limit(http: httpx.Client, pieces: int) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(pieces):
            yield b" " * (2**16 // pieces + 1)

    answer = http.post("/v1/completions", content=body())
    assert answer.status_code == 413


def test_a_client_that_leaves_while_sending_disturbs_nobody(server: Server, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert http.get("/health").json() == {"status": "ok"}
