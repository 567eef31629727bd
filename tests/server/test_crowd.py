"""Many clients at once, of whom some leave: the others must not notice, and nothing may be left behind."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.engine.llm import LLM
from parlay.types import SamplingParams
from tests.serving import Server, serving, until
from tests.tiny import make_tiny_llama

CLIENTS = 200
MAX_TOKENS = 16


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """In float64, where no text depends on who shares the batch, and short of pages, so that rows are preempted."""
    folder = make_tiny_llama(tmp_path / "tiny")
    page = 16 * 2 * 2 * 2 * 8 * 8  # positions, keys and values, layers, heads, dimensions, bytes
    return EngineConfig(
        str(folder), dtype="float64", device="cpu", max_num_seqs=24, kv_cache_memory=40 * page, self_check=False
    )


@pytest.fixture
def engine(config: EngineConfig) -> Engine:
    return Engine(config)


@pytest.fixture
def server(engine: Engine) -> Iterator[Server]:
    with serving(engine) as running:
        yield running


def prompt(number: int) -> str:
    return f"{number} the and the {number}"


async def ask(server: Server, number: int, leaves_after: int | None) -> str | None:
    """The text that one client gets; None from one that leaves after so many events, or before the first."""
    body = json.dumps(
        {"prompt": prompt(number), "temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(server.url).port)
    writer.write(head.encode() + body.encode())
    texts: list[str] = []
    try:
        while len(texts) != leaves_after and (line := await reader.readline()):
            if line.startswith(b"data: {"):
                texts.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["text"])
    finally:
        writer.close()
        await writer.wait_closed()
    return "".join(texts) if leaves_after is None else None


def run_crowd(server: Server, leaving: dict[int, int]) -> list[str | None]:
    async def main() -> list[str | None]:
        return await asyncio.gather(*(ask(server, number, leaving.get(number)) for number in range(CLIENTS)))

    return asyncio.run(main())


def test_those_who_stay_get_their_texts_when_a_third_leaves(
    config: EngineConfig, server: Server, engine: Engine
) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = LLM(config).generate([prompt(number) for number in range(CLIENTS)], params, use_tqdm=False)
    undisturbed = [output.outputs[0].text for output in outputs]
    assert len(set(undisturbed)) > CLIENTS // 2
    chance = random.Random(5)
    leaving = {number: chance.randrange(MAX_TOKENS // 2) for number in chance.sample(range(CLIENTS), CLIENTS // 3)}
    texts = run_crowd(server, leaving)
    assert [text is None for text in texts] == [number in leaving for number in range(CLIENTS)]
    assert all(text in (None, expected) for text, expected in zip(texts, undisturbed, strict=True))
    until(lambda: not engine.has_work)
    engine.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_pages
    assert engine.scheduler.preemptions > 0


def test_a_client_that_leaves_frees_its_pages_before_another_step(
    server: Server, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, step, steps = threading.Semaphore(0), engine.step, [0]

    def gated() -> Any:
        assert gate.acquire(timeout=20), "a step after the client has left"
        steps[0] += 1
        return step()

    monkeypatch.setattr(engine, "step", gated)
    body = {"prompt": "the and", "n": 3, "max_tokens": 100, "ignore_eos": True, "stream": True}
    body["seed"] = 1  # by chance, two steps may bring but parts of characters, and no line
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        gate.release(2)
        next(answer.iter_lines())
    until(lambda: not engine.has_work or server.worker._commands.qsize() > 0)  # the news of its leaving is there
    gate.release()  # for the step that has begun meanwhile
    until(lambda: not engine.has_work)
    assert steps[0] <= 3
    assert server.worker.failure is None
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_pages
    engine.check_integrity()
