from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from parlay.server.worker import EngineWorker, ShuttingDown
from parlay.types import InvalidRequest, Request, SamplingParams
from tests.server.stand_in import StandIn


def request(name: str, prompt: bytes = b"abc", max_tokens: int = 3, n: int = 1) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, n=n))


@asynccontextmanager
async def working(engine: StandIn) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(engine)
    worker.start()
    try:
        yield worker
    finally:
        await asyncio.to_thread(worker.stop)


def test_deltas_arrive_in_order_from_one_thread() -> None:
    async def main() -> None:
        engine = StandIn()
        async with working(engine) as worker:
            generation = await worker.submit([request("a", n=2), request("b", b"xy")])
            texts: dict[tuple[str, int], str] = {}
            async for deltas in generation:
                for delta in deltas:
                    key = delta.request_id, delta.choice
                    texts[key] = texts.get(key, "") + delta.text
            generation.close()
        assert texts == {("a", 0): "abc", ("a", 1): "abc", ("b", 0): "xyx"}
        assert engine.threads == {"parlay-engine"}

    asyncio.run(main())


def test_all_or_none_are_admitted() -> None:
    async def main() -> None:
        engine = StandIn(paced=True)
        async with working(engine) as worker:
            with pytest.raises(InvalidRequest):
                await worker.submit([request("fine"), request("long", b"x" * 300)])
            assert not engine.live
            assert engine.aborted == {"fine"}

    asyncio.run(main())


def test_leaving_before_admission_frees_the_request() -> None:
    async def main() -> None:
        engine = StandIn(paced=True)
        async with working(engine) as worker:
            task = asyncio.create_task(worker.submit([request("a", max_tokens=100)]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not engine.live

    asyncio.run(main())


def test_stopping_ends_what_is_in_flight() -> None:
    async def main() -> None:
        engine = StandIn(paced=True)
        async with working(engine) as worker:
            generation = await worker.submit([request("a", max_tokens=100)])
            await asyncio.to_thread(worker.stop)
            with pytest.raises(ShuttingDown):
                await anext(generation)
            with pytest.raises(ShuttingDown):
                await worker.submit([request("b")])
        assert engine.aborted == {"a"}

    asyncio.run(main())


def test_stopping_twice_or_before_the_start_is_fine() -> None:
    worker = EngineWorker(StandIn())
    worker.stop()
    worker.stop()


def test_a_closed_loop_ends_the_thread() -> None:
    engine = StandIn(paced=True)
    worker = EngineWorker(engine)

    async def main() -> None:
        worker.start()
        await worker.submit([request("a", max_tokens=100)])

    asyncio.run(main())
    assert engine.pace is not None
    engine.pace.release()
    worker._thread.join()
