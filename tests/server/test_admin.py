"""Policies are switched while requests run, by whoever has the key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from parlay.config import EngineConfig
from parlay.drafters.suffix import Suffix
from parlay.engine.engine import Engine
from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, serving
from tests.tiny import make_tiny_llama

KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    config = EngineConfig(str(folder), dtype="float64", device="cpu", self_check=False, compile="off")
    with serving(Engine(config), api_key="sesame") as running:
        yield running


def switch(server: Server, body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/policy", json=body, headers=KEY, timeout=60)


def test_there_is_none_without_a_key() -> None:
    with serving(StandIn()) as server:
        assert httpx.get(f"{server.url}/admin/policy").status_code == 404
        assert httpx.post(f"{server.url}/admin/policy", json={"policy": "off"}).status_code == 404


def test_the_key_is_asked_for(server: Server) -> None:
    assert httpx.post(f"{server.url}/admin/policy", json={"policy": "off"}).status_code == 401
    assert httpx.get(f"{server.url}/admin/policy").status_code == 401


def test_requests_that_run_go_on_and_end_with_the_same_text(server: Server) -> None:
    """Policies change all the time while they run."""

    def answer(prompt: str) -> str:
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 100, "ignore_eos": True}
        found = httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY, timeout=60).json()
        assert found["usage"]["completion_tokens"] == 100
        return found["choices"][0]["text"]

    prompts = [f"the and of {word} the and of" for word in ("a", "to", "in", "is")]
    assert switch(server, {"policy": "off"}).json() == {"policy": "off"}
    expected = [answer(prompt) for prompt in prompts]
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=p: found.update({p: answer(p)})) for p in prompts]
    for thread in threads:
        thread.start()
    for name in ("fixed:3", "goodput", "smartspec", "off", "synergy", "auto"):
        assert switch(server, {"policy": name}).json() == {"policy": name}
        assert httpx.get(f"{server.url}/admin/policy", headers=KEY).json() == {"policy": name}
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


def test_answers_are_forgotten(server: Server) -> None:
    engine = server.worker.engine
    assert isinstance(engine, Engine)
    suffix = engine.drafters.by_name["suffix"]
    assert isinstance(suffix, Suffix)
    body = {"model": MODEL, "prompt": "the and of", "max_tokens": 30, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY, timeout=60)
    assert suffix.shared is not None
    assert len(suffix.shared) > 0
    assert httpx.post(f"{server.url}/admin/forget", headers=KEY).json() == {"forgotten": True}
    assert len(suffix.shared) == 0
    assert httpx.post(f"{server.url}/admin/forget").status_code == 401


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"policy": "goodputt"}, "policy: unknown name 'goodputt' among policies; did you mean 'goodput'"),
        ({"policy": "fixed:77"}, "policy: 'fixed:77': write a length from 1 to"),
        ({"policy": 3}, "policy: must be a valid string"),
        ({}, "policy: is required"),
        ({"policy": "off", "depth": 2}, "depth: "),
        ([], "object"),
    ],
)
def test_bad_wishes_change_nothing(server: Server, body: object, message: str) -> None:
    switch(server, {"policy": "auto"})
    answer = switch(server, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/admin/policy", headers=KEY).json() == {"policy": "auto"}


def test_a_policy_wants_somebody_to_bet_on(folder: Path) -> None:
    settings = EngineConfig(
        str(folder), device="cpu", self_check=False, compile="off", speculation=None, policy="synergy"
    )
    with pytest.raises(ValueError, match="nothing to bet on"):
        Engine(settings)
