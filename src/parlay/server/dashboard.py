"""The dashboard: one page without outside assets, and the events that keep it up to date, one a second.

The page itself says nothing about anybody, so it is there without a key; the events are not.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from http import HTTPStatus
from importlib import resources
from typing import Any

from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from parlay.engine.monitor import Monitor
from parlay.server.errors import ApiError
from parlay.server.worker import EngineFailed, EngineWorker

SCRIPTS = "charts.js", "panels.js", "page.js"
EVERY = 1.0  # seconds
MOST = 16  # who may look on at a time


class Dashboard:
    """The page and its events.

    Args:
        worker: Runs the engine.
        monitor: Watches it.
    """

    def __init__(self, worker: EngineWorker, monitor: Monitor) -> None:
        self._worker, self._monitor = worker, monitor
        self._watched = 0
        self._asking = asyncio.Lock()
        self._taken, self._found = -math.inf, dict[str, Any]()  # the last snapshot and its time; one does for all

    async def page(self) -> Response:
        """The page; its scripts run because of a word that no other script can know."""
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {
            "Content-Security-Policy": f"{policy}; img-src data:; base-uri 'none'; form-action 'none'",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        return HTMLResponse(_page().replace("NONCE", nonce), headers=headers)

    async def events(self) -> Response:
        """Snapshots of `parlay.engine.monitor.Monitor` as server-sent events.

        Raises:
            ApiError: 429 when too many look on already.
        """
        if self._watched >= MOST:
            message = f"{MOST} dashboards look on already; close one of them"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="too_many_dashboards")
        self._watched += 1
        return _Events(self._snapshots(), self._leave)

    def _leave(self) -> None:
        self._watched -= 1

    async def _snapshots(self) -> AsyncIterator[bytes]:
        """One a second, for as long as the engine lives and somebody reads; the first has all that is remembered."""
        since = -math.inf
        try:
            while not self._worker.leaving:
                found = await self._snapshot()
                points = [point for point in found["points"] if point["at"] >= since]
                since = int(found["now"])
                yield b"data: " + json.dumps({**found, "points": points}, separators=(",", ":")).encode() + b"\n\n"
                await asyncio.sleep(EVERY)
        except EngineFailed as failure:
            yield b"event: failed\ndata: " + json.dumps({"reason": str(failure)}).encode() + b"\n\n"

    async def _snapshot(self) -> dict[str, Any]:
        async with self._asking:
            if time.monotonic() - self._taken >= EVERY / 2:
                self._found = await self._worker.ask(lambda _: self._monitor.snapshot())
                self._taken = time.monotonic()
            return self._found


class _Events(StreamingResponse):
    """A stream that says when it is over, begun or not."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


@lru_cache(maxsize=1)
def _page() -> str:
    """The page with its style and scripts in it."""
    folder = resources.files("parlay.server") / "page"
    page, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "style.css"))
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return page.replace("/* STYLE */", style).replace("/* SCRIPT */", script)
