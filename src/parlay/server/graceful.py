"""The HTTP server's beginning and end: it says when it is ready, and leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from parlay.server.worker import EngineWorker

GRACE_SECONDS = 30.0  # what is in flight may finish for this long when the server stops
FAREWELL_SECONDS = 5  # and then has this long to be told of the end


class GracefulServer(uvicorn.Server):
    """Serves an app, and when told to stop lets what is in flight finish for a while.

    What is left then ends in the app's own words, because the engine stops before uvicorn cancels anything.

    Args:
        app: What to serve.
        worker: Runs the app's engine.
        grace_seconds: How long what is in flight may finish.
        announce: Called once connections are accepted.
        settings: For `uvicorn.Config`.
    """

    def __init__(
        self,
        app: FastAPI,
        worker: EngineWorker,
        *,
        grace_seconds: float,
        announce: Callable[[], None],
        **settings: Any,
    ) -> None:
        limit = math.ceil(grace_seconds) + FAREWELL_SECONDS
        super().__init__(uvicorn.Config(app, lifespan="on", timeout_graceful_shutdown=limit, **settings))
        self._worker = worker
        self._grace_seconds = grace_seconds
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.leaving = True
        cut_off = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            cut_off.cancel()

    async def _cut_off(self) -> None:
        await asyncio.sleep(self._grace_seconds)
        await asyncio.to_thread(self._worker.stop)
