"""The border between asyncio and the engine: one thread owns the engine, the event loop owns everything else.

Commands go to the thread through a queue, which it drains before each step and blocks on when the engine is idle.
Results come back with one wake-up of the event loop per step, however many requests took part.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

from parlay.server.admission import QueueFull, QueueLimit
from parlay.server.contract import ServingEngine
from parlay.types import Delta, InvalidRequest, Request

MAX_QUEUE_SIZE = 1024
T = TypeVar("T")

logger = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine cannot finish this request; the message is for the client."""


class ShuttingDown(EngineFailed):
    """The server is on its way out."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Watcher(Protocol):
    """Sees what happens to the requests of one admitted call as it happens, on the event loop."""

    def arrive(self, deltas: Sequence[Delta]) -> None: ...

    def end(self, failed: bool) -> None:
        """Nothing more will arrive; called at least once."""
        ...


class Generation:
    """What comes back for the requests of one HTTP call: an asynchronous iterator of deltas, step by step.

    Whoever got it calls `close`, which frees everything the requests hold in the engine.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        release: Callable[[Sequence[Request]], None],
        watcher: Watcher | None = None,
    ) -> None:
        self.requests = tuple(requests)
        self._watcher = watcher
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._release = release
        self._arrivals: asyncio.Queue[Sequence[Delta] | EngineFailed] = asyncio.Queue()
        self.num_choices = self._unfinished = sum(request.params.n for request in requests)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Delta]:
        if self._unfinished == 0:
            raise StopAsyncIteration
        arrival = await self._arrivals.get()
        if isinstance(arrival, EngineFailed):
            raise arrival
        for delta in arrival:
            self._unfinished -= delta.finish_reason is not None
        return arrival

    def arrive(self, arrival: Sequence[Delta] | EngineFailed) -> None:
        """Takes the deltas of one step, or the end of all hope; runs on the event loop."""
        if self._watcher is not None:
            if isinstance(arrival, EngineFailed):
                self._watcher.end(failed=True)
            else:
                self._watcher.arrive(arrival)
        self._arrivals.put_nowait(arrival)

    def close(self) -> None:
        """Aborts what is unfinished; harmless when all is finished."""
        self._release(self.requests)
        if self._watcher is not None:
            self._watcher.end(failed=False)


@dataclass(frozen=True, slots=True)
class _Add:
    generation: Generation


@dataclass(frozen=True, slots=True)
class _Release:
    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class _Ask:
    question: Callable[[ServingEngine], object]
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineWorker:
    """Runs an engine on a thread of its own for callers on an event loop.

    Args:
        engine: What to run; the worker's from now on.
        max_queue_size: Choices that may wait; see `parlay.server.admission.QueueLimit`.
    """

    def __init__(self, engine: ServingEngine, max_queue_size: int = MAX_QUEUE_SIZE) -> None:
        self.engine = engine
        self.failure: str | None = None  # why the engine is broken; set once, by the engine thread
        self.status = engine.status()  # as of the last turn; replaced by the engine thread
        self.leaving = False  # the server was told to end: what is in flight may finish, who looks on should go
        self._queue_limit = QueueLimit(max_queue_size)
        self._commands: queue.SimpleQueue[_Add | _Release | _Ask | _Stop] = queue.SimpleQueue()
        self._door = threading.Lock()  # nothing is added behind the last command, `_Stop`
        self._closing = False
        self._stopped = False  # the engine thread's
        self._live: dict[str, Generation] = {}  # by request id; the engine thread's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="parlay-engine", daemon=True)

    def start(self) -> None:
        """Starts the engine thread; results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Aborts what is in flight and joins the thread; may be called twice, and from any thread."""
        with self._door:
            self._closing = True
            self._commands.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join()

    def check_open(self) -> None:
        """Refuses a call before any work is put into it, by the last turn's status; `submit` decides exactly.

        Raises:
            QueueFull: when not even one more choice may wait.
            EngineFailed: when the engine is stopping.
        """
        if self._closing:
            raise ShuttingDown()
        self._queue_limit.check_any(self.status)

    async def submit(self, requests: Sequence[Request], watcher: Watcher | None = None) -> Generation:
        """Admits all requests of one call, or none; the watcher is told only of what is admitted.

        Raises:
            InvalidRequest: when the engine refuses one of them.
            QueueFull: when too many wait already.
            EngineFailed: when the engine is broken or stopping.
        """
        generation = Generation(requests, self._release, watcher)
        with self._door:
            if self._closing:
                raise ShuttingDown()
            self._commands.put(_Add(generation))
        try:
            await generation.admitted
        except BaseException:
            self._release(requests)
            raise
        return generation

    async def ask(self, question: Callable[[ServingEngine], T]) -> T:
        """Puts a question to the engine between two steps; what it raises is raised here.

        Raises:
            EngineFailed: when the engine is broken or stopping.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._door:
            if self._closing:
                raise ShuttingDown()
            self._commands.put(_Ask(question, answer))
        return await answer

    def _release(self, requests: Sequence[Request]) -> None:
        self._commands.put(_Release(requests))

    # Everything below runs on the engine thread, except the functions handed to the event loop.

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._turn()
            except Exception as error:
                logger.exception("the engine failed")
                self.failure = f"the engine failed: {type(error).__name__}: {error}"
                self.status = replace(self.status, running=0, waiting=0)
                self._fail_live(lambda: EngineFailed(self.failure))

    def _turn(self) -> None:
        """Obeys the waiting commands, then runs one step."""
        for command in self._waiting_commands():
            match command:
                case _Add(generation):
                    self._add(generation)
                case _Release(requests):
                    self._abort(requests)
                case _Ask(question, answer):
                    self._answer(question, answer)
                case _Stop():
                    self._stopped = True
                    self._abort(self._fail_live(ShuttingDown))
                    return
        deltas = self.engine.step() if self._busy else ()
        if self.failure is None:
            self.status = self.engine.status()  # before anybody hears of the step, so that nobody finds it older
        self._deliver(deltas)

    @property
    def _busy(self) -> bool:
        return self.failure is None and self.engine.has_work

    def _waiting_commands(self) -> Iterator[_Add | _Release | _Ask | _Stop]:
        """All commands in the queue; the first is waited for when there is nothing else to do."""
        if not self._busy:
            yield self._commands.get()
        while True:
            try:
                yield self._commands.get_nowait()
            except queue.Empty:
                return

    def _add(self, generation: Generation) -> None:
        if self.failure is not None:
            return self._tell(_fail, generation.admitted, EngineFailed(self.failure))
        try:
            self._queue_limit.check(self.engine.status(), generation.num_choices)
            for request in generation.requests:
                self._live[request.id] = generation
                self.engine.add(request)
        except Exception as error:
            self._abort(generation.requests)
            if not isinstance(error, InvalidRequest | QueueFull):  # one odd request is no reason to fail all others
                logger.exception("the engine failed to take a request")
                error = EngineFailed(f"the engine failed to take this request: {type(error).__name__}: {error}")
            self._tell(_fail, generation.admitted, error)
        else:
            self._tell(_settle, generation.admitted, None)

    def _answer(self, question: Callable[[ServingEngine], object], answer: asyncio.Future[Any]) -> None:
        if self.failure is not None:
            return self._tell(_fail, answer, EngineFailed(self.failure))
        try:
            found = question(self.engine)
        except Exception as error:  # an odd question is no reason to fail requests
            self._tell(_fail, answer, error)
        else:
            self._tell(_settle, answer, found)

    def _abort(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if self._live.pop(request.id, None) is not None and self.failure is None:
                self.engine.abort(request.id)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        self._queue_limit.finished(sum(delta.finish_reason is not None for delta in deltas))
        mail: dict[Generation, list[Delta]] = {}
        for delta in deltas:
            if (generation := self._live.get(delta.request_id)) is not None:
                mail.setdefault(generation, []).append(delta)
        if mail:
            self._tell(_hand_out, mail)

    def _fail_live(self, failure: Callable[[], EngineFailed]) -> list[Request]:
        """Ends every live call with a failure of its own, so that nobody is left hanging; their requests."""
        generations = dict.fromkeys(self._live.values())
        if generations:
            self._tell(_hand_out, {generation: failure() for generation in generations})
        return [request for generation in generations for request in generation.requests]

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self._commands.put(_Stop())


def _settle(answer: asyncio.Future[Any], found: object) -> None:
    if not answer.done():  # done when whoever asked left meanwhile
        answer.set_result(found)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _hand_out(mail: dict[Generation, Sequence[Delta] | EngineFailed]) -> None:
    for generation, arrival in mail.items():
        generation.arrive(arrival)
