"""A run: every request at its time, whatever the others do, and no more at a time than allowed."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from parlay.bench.client import Reply, Target, Wish, ask, connect, prepare
from parlay.bench.workloads import Prompt

TIMEOUT = 600.0  # seconds until a request counts as failed


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come: what it asks, and how many seconds after the start."""

    prompt: Prompt
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that was answered or failed; it was due at `due` on the clock of the reply."""

    prompt: Prompt
    due: float
    reply: Reply


@dataclass(frozen=True, slots=True)
class Traffic:
    """What became of a run.

    Attributes:
        began: Start on the clock of the replies, in seconds.
        outcomes: In the order of the plan, without those that an interruption left unfinished.
        unfinished: How many those are.
    """

    began: float
    outcomes: tuple[Outcome, ...]
    unfinished: int


def send(
    target: Target,
    wish: Wish,
    plan: Sequence[Planned],
    concurrency: int | None,
    done: Callable[[], None] = lambda: None,
    timeout: float = TIMEOUT,
) -> Traffic:
    """Sends all requests and waits for all answers; SIGINT ends the run with what is finished.

    Args:
        target: Where to.
        wish: What to ask of every request.
        plan: In the order of their times.
        concurrency: Most requests in flight; those that are due meanwhile wait in order. None sets no limit.
        done: Called after each request, failed or not.
        timeout: Seconds that a request may take.

    Raises:
        ValueError: when a prompt does not suit the endpoint.
    """
    return asyncio.run(_Run(plan, concurrency, done, timeout).send(target, wish))


class _Run:
    def __init__(
        self, plan: Sequence[Planned], concurrency: int | None, done: Callable[[], None], timeout: float
    ) -> None:
        self._plan = plan
        self._concurrency = concurrency
        self._gate = asyncio.Semaphore(concurrency or len(plan))
        self._done = done
        self._timeout = timeout
        self._outcomes: list[Outcome | None] = [None] * len(plan)

    async def send(self, target: Target, wish: Wish) -> Traffic:
        """The run, from the start until nothing is in flight."""
        task = asyncio.current_task()
        assert task is not None
        async with connect(self._concurrency) as client:
            requests = [prepare(client, target, wish, planned.prompt) for planned in self._plan]
            _cancel_at_interrupt(task)
            began = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for number, (planned, request) in enumerate(zip(self._plan, requests, strict=True)):
                        due = began + planned.at
                        await asyncio.sleep(max(0.0, due - time.perf_counter()))
                        await self._gate.acquire()
                        group.create_task(self._ask(client, request, number, due))
            except asyncio.CancelledError:  # by SIGINT; the group has cancelled its tasks
                task.uncancel()
        outcomes = tuple(outcome for outcome in self._outcomes if outcome is not None)
        return Traffic(began, outcomes, len(self._plan) - len(outcomes))

    async def _ask(self, client: httpx.AsyncClient, request: httpx.Request, number: int, due: float) -> None:
        try:
            reply = await ask(client, request, self._timeout)
        finally:
            self._gate.release()
        self._outcomes[number] = Outcome(self._plan[number].prompt, due, reply)
        self._done()


def _cancel_at_interrupt(task: asyncio.Task[Traffic]) -> None:
    """Lets the first SIGINT cancel the task; the next one is Python's own.

    The handler of `asyncio.run` does not wake a loop that was about to wait when the signal came, so a run whose server
    keeps silent would go on; a handler of the loop does.
    """
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    if threading.current_thread() is threading.main_thread():  # others hear no signals
        loop.add_signal_handler(signal.SIGINT, interrupt)
