"""A real engine that breaks in the middle of its work: everybody hears of it, and nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from tests.serving import MODEL, Server, engine_threads, serving, until
from tests.tiny import make_tiny_llama

LONG: dict[str, Any] = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    folder = make_tiny_llama(tmp_path / "tiny")
    return Engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", max_num_seqs=2, self_check=False))


@pytest.fixture
def server(engine: Engine) -> Iterator[Server]:
    with serving(engine) as running:
        yield running


def break_after(engine: Engine, monkeypatch: pytest.MonkeyPatch, passes: int) -> threading.Event:
    """Lets the model run so often, then waits for the event and fails."""
    verify, left, doom = engine.model.verify, [passes], threading.Event()

    def verify_or_fail(*arguments: Any) -> Any:
        if left[0] == 0:
            doom.wait(60)
            raise RuntimeError("the accelerator is gone")
        left[0] -= 1
        return verify(*arguments)

    monkeypatch.setattr(engine.model, "verify", verify_or_fail)
    return doom


def test_a_model_that_fails_in_the_middle_of_a_stream(
    engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    doom = break_after(engine, monkeypatch, passes=5)
    failures: list[openai.APIError] = []

    def ask(number: int) -> None:
        stream = number % 2 == 0
        with server.client() as client, pytest.raises(openai.APIError) as caught:
            list(client.completions.create(model=MODEL, prompt=f"{number} the", stream=stream, **LONG))
        failures.append(caught.value)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    with server.client() as client:
        stream = iter(client.completions.create(model=MODEL, prompt="the", stream=True, **LONG))
        next(stream)
        for thread in threads:
            thread.start()
        # When the model fails, some requests have reached the engine, and some may wait in the queue before it.
        until(lambda: server.worker._commands.qsize() + len(engine._streams) >= len(threads) + 1)
        doom.set()
        with pytest.raises(openai.APIError, match="RuntimeError: the accelerator is gone"):
            list(stream)
    for thread in threads:
        thread.join()
    assert {failure.code for failure in failures} == {"engine_failed"}
    assert len(failures) == len(threads)
    with server.http() as http:
        health = http.get("/health")
        assert health.status_code == 503
        assert "the accelerator is gone" in health.json()["reason"]
        for stream_wanted in (False, True):
            answer = http.post("/v1/completions", json={"prompt": "x", "stream": stream_wanted})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_failed"
        assert http.get("/v1/models").status_code == 200
        assert 'parlay:num_requests_running{model_name="tiny"} 0.0' in http.get("/metrics").text


def test_a_failed_engine_lets_the_server_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_threads()
    break_after(engine, monkeypatch, passes=0).set()
    with serving(engine) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 500
    assert engine_threads() == before
