"""The HTTP application and `serve`, which runs it until told to stop."""

from __future__ import annotations

import asyncio
import gc
import hmac
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from rich.console import Console
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from parlay import __version__
from parlay.config import EngineConfig
from parlay.engine.monitor import Monitor
from parlay.server.admission import QueueFull
from parlay.server.answers import EventStream, whole_answer
from parlay.server.call import Call, check_model
from parlay.server.chat import prepare_chat
from parlay.server.completions import prepare_completion
from parlay.server.contract import ServingEngine
from parlay.server.dashboard import Dashboard
from parlay.server.errors import CLIENT_GONE, ApiError, install_error_handlers
from parlay.server.graceful import GRACE_SECONDS, GracefulServer
from parlay.server.metrics import Metrics
from parlay.server.schema import parse_policy
from parlay.server.transport import read_body, unless_gone
from parlay.server.worker import MAX_QUEUE_SIZE, EngineFailed, EngineWorker, ShuttingDown

MAX_BODY_BYTES = 8 * 2**20
T = TypeVar("T")

Prepare = Callable[[bytes, ServingEngine, Sequence[str]], Call]


@dataclass(frozen=True, slots=True)
class Service:
    """The endpoints over one engine.

    Attributes:
        worker: Runs the engine.
        names: What clients may call the model; answers have the first.
        metrics: Where calls are counted.
        api_key: What clients must present; None lets everybody in.
        max_body_bytes: Longer bodies are answered with 413.
        dashboard: The page that shows how the engine stands, if there is one.
        created: When the model was loaded, in seconds since the epoch.
    """

    worker: EngineWorker
    names: tuple[str, ...]
    metrics: Metrics
    api_key: str | None
    max_body_bytes: int
    dashboard: Dashboard | None
    created: int = field(default_factory=lambda: int(time.time()))

    def router(self) -> APIRouter:
        """The routes; all but /health, /metrics and the dashboard's page, which holds nothing by itself, ask for the
        key, and without one there is no /admin."""
        guarded = APIRouter(dependencies=[Depends(self.authorise)])
        guarded.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"], response_model=None)
        guarded.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        guarded.add_api_route("/v1/models", self.models, methods=["GET"])
        guarded.add_api_route("/v1/models/{name:path}", self.model_card, methods=["GET"])
        guarded.add_api_route("/version", self.version, methods=["GET"])
        if self.api_key is not None:  # whoever may change what others get has to show who it is
            guarded.add_api_route("/admin/policy", self.policy, methods=["GET"])
            guarded.add_api_route("/admin/policy", self.use_policy, methods=["POST"])
            guarded.add_api_route("/admin/forget", self.forget, methods=["POST"])
        routes = APIRouter()
        if self.dashboard is not None:
            routes.add_api_route("/dashboard", self.dashboard.page, methods=["GET"], response_model=None)
            guarded.add_api_route("/dashboard/events", self.dashboard.events, methods=["GET"], response_model=None)
        routes.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        routes.add_api_route("/metrics", self.write_metrics, methods=["GET"], response_model=None)
        routes.include_router(guarded)
        return routes

    async def authorise(self, request: Request) -> None:
        if self.api_key is None:
            return
        shown = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(shown, b"Bearer " + self.api_key.encode()):
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(prepare_chat, request)

    async def completions(self, request: Request) -> Response:
        return await self._generate(prepare_completion, request)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in self.names]}

    async def model_card(self, name: str) -> dict[str, Any]:
        check_model(name, self.names)
        return self._card(name)

    async def health(self) -> Response:
        if self.worker.failure is not None:
            return JSONResponse({"status": "failed", "reason": self.worker.failure}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ok"})

    async def write_metrics(self, request: Request) -> Response:
        body, content_type = self.metrics.write(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def version(self) -> dict[str, str]:
        return {"version": __version__}

    async def policy(self) -> dict[str, str]:
        return {"policy": self.worker.engine.policy_name}

    async def use_policy(self, request: Request) -> dict[str, str]:
        wish = parse_policy(await read_body(request, self.max_body_bytes))
        await self.worker.ask(lambda engine: engine.use_policy(wish))
        return {"policy": wish}

    async def forget(self) -> dict[str, bool]:
        await self.worker.ask(lambda engine: engine.forget_answers())
        return {"forgotten": True}

    async def _generate(self, prepare: Prepare, request: Request) -> Response:
        body = await read_body(request, self.max_body_bytes)
        arrived = time.perf_counter()
        num_choices = 1  # nobody knows better before the body is understood
        try:
            self.worker.check_open()
            call = await asyncio.to_thread(prepare, body, self.worker.engine, self.names)
            num_choices = call.num_choices
            generation = await self.worker.submit(call.requests, self.metrics.watch(call.requests, arrived))
        except QueueFull:
            self.metrics.refuse(num_choices)
            raise
        except ShuttingDown:
            raise
        except EngineFailed:
            self.metrics.fail(num_choices)
            raise
        if call.stream:
            return EventStream(call, generation)
        try:
            answer = await unless_gone(request, whole_answer(call, generation))
        finally:
            generation.close()
        return Response(answer, HTTPStatus.OK if answer else CLIENT_GONE, media_type="application/json")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "parlay",
            "max_model_len": self.worker.engine.max_model_len,
        }


def create_app(
    worker: EngineWorker,
    *,
    names: Sequence[str],
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    monitor: Monitor | None = None,
) -> FastAPI:
    """The application over a worker, which it starts and stops with itself.

    Args:
        worker: Runs the engine.
        names: What clients may call the model; answers have the first.
        api_key: What clients must present; None lets everybody in.
        max_body_bytes: Longer bodies are answered with 413.
        monitor: Watches the engine for the dashboard; None for no dashboard.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    # No schema pages: bodies are read and checked off the event loop, where FastAPI does not see their types.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    metrics = Metrics(names[0], lambda: worker.status)
    dashboard = None if monitor is None else Dashboard(worker, monitor)
    app.include_router(Service(worker, tuple(names), metrics, api_key, max_body_bytes, dashboard).router())
    install_error_handlers(app)
    return app


def _aside(build: Callable[[], T]) -> T:
    """Builds something on a thread that then ends.

    OpenMP gives every thread that computes helpers of its own, for as long as it lives. Those of a main thread that
    computed once would make all helpers together more than the cores, and OpenMP then puts them to sleep after every
    operation: on 2 cores a step took three times as long.
    """
    built: Future[T] = Future()

    def run() -> None:
        try:
            built.set_result(build())
        except BaseException as error:
            built.set_exception(error)

    thread = threading.Thread(target=run, name="parlay-load", daemon=True)
    thread.start()
    found = built.result()
    thread.join()
    return found


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_names: Sequence[str] = (),
    api_key: str | None = None,
    max_queue_size: int = MAX_QUEUE_SIZE,
    max_body_bytes: int = MAX_BODY_BYTES,
    access_log: bool = False,
    grace_seconds: float = GRACE_SECONDS,
    record: Path | None = None,
) -> None:
    """Loads the model and serves it until SIGINT or SIGTERM.

    Args:
        config: What to build the engine from.
        host: The address to listen on.
        port: 0 takes a free one.
        served_model_names: What clients may call the model; none takes `config.model`. Answers have the first.
        api_key: What clients must present; None lets everybody in.
        max_queue_size: Choices that may wait; calls beyond that are answered with 429.
        max_body_bytes: Longer bodies are answered with 413.
        access_log: Log every HTTP request.
        record: Write what is asked and what becomes of it to this file, without texts; see `parlay.engine.recording`.
        grace_seconds: What is in flight may finish for this long when the server stops; the rest is told of the end.

    Raises:
        OSError: when the address cannot be had, before anything is loaded.
    """
    from parlay.engine.engine import Engine  # loads torch: not for those who only build an app
    from parlay.engine.recording import Recording

    listener = _bind(host, port)
    recording: Recording | None = None
    try:
        engine = _aside(lambda: Engine(config))
        if record is not None:
            recording = Recording(engine, record)
            recording.start()
        gc.collect()
        gc.freeze()  # what was loaded stays: looking through all of it again stopped everybody for 0.3 s (measured)
        worker = EngineWorker(engine, max_queue_size)
        names = tuple(served_model_names) or (config.model,)
        monitor = Monitor(engine)
        app = create_app(worker, names=names, api_key=api_key, max_body_bytes=max_body_bytes, monitor=monitor)
        precision = str(engine.model.dtype).removeprefix("torch.")
        ready = f"{names[0]} ({precision}, {', '.join(map(str, engine.model.devices))}) is ready at {_url(listener)}"
        server = GracefulServer(
            app,
            worker,
            grace_seconds=grace_seconds,
            announce=lambda: Console().print(ready, highlight=False, markup=False, soft_wrap=True),
            log_level="info" if access_log else "warning",
            access_log=access_log,
        )
        try:
            with _terminable():
                server.run(sockets=[listener])
        finally:
            worker.stop()  # a second Ctrl-C skips the app's own ending
            if recording is not None:
                recording.close()
    except KeyboardInterrupt:  # uvicorn raises it again once all is closed
        pass
    finally:
        listener.close()


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does: uvicorn raises the signal again once all is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bind(host: str, port: int) -> socket.socket:
    """Takes the address without listening yet: until the model is loaded clients are refused, not left waiting."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
