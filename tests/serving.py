"""Runs the real application on a real port for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai

from parlay.server.app import create_app
from parlay.server.contract import ServingEngine
from parlay.server.graceful import GracefulServer
from parlay.server.worker import EngineWorker

MODEL = "tiny"


def until(condition: Callable[[], bool]) -> None:
    """Waits for what must come; the suite's own time limit ends a wait for what does not."""
    while not condition():
        time.sleep(0.005)


def engine_threads() -> set[threading.Thread]:
    """The threads that run an engine now."""
    return {thread for thread in threading.enumerate() if thread.name == "parlay-engine"}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its worker."""

    url: str
    worker: EngineWorker
    stop: Callable[[], None]  # tells it to end, and does not wait

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@contextmanager
def serving(
    engine: ServingEngine,
    *,
    grace: float = 10,
    max_queue_size: int = 1024,
    aliases: Sequence[str] = (),
    **options: object,
) -> Iterator[Server]:
    """Serves `engine` on a free loopback port; `options` go to `create_app`.

    `grace` is in seconds.
    """
    worker = EngineWorker(engine, max_queue_size)
    app = create_app(worker, names=[MODEL, *aliases], **options)  # pyright: ignore[reportArgumentType]
    up = threading.Event()
    server = GracefulServer(app, worker, grace_seconds=grace, announce=up.set, log_config=None)

    def stop() -> None:
        server.should_exit = True

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
        thread.start()
        try:
            assert up.wait(60)
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", worker, stop)
        finally:
            stop()
            thread.join()
