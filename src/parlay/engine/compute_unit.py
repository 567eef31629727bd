"""Where else to compute: a thread with half of the cores, or with a CUDA stream of its own on each device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

T = TypeVar("T")
Moment = float | torch.cuda.Event


class Unit:
    """Where candidates are begun: a thread with half of the cores, or with a CUDA stream of its own on each device.

    Args:
        devices: The target's, the one first where its steps begin and end.

    Raises:
        ValueError: where there is but one core.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._device, self._thread = devices[0], ThreadPoolExecutor(1, thread_name_prefix="parlay-ahead")
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]
        self._cores = cores()
        self._all = torch.get_num_threads()  # of the target's where nothing is begun
        if not self._streams:
            if len(self._cores) < 2:
                raise ValueError("ppd needs a second core, on which to begin the next token; it would only take turns")
            self._thread.submit(self._settle).result()
            torch.set_num_threads(self._all)  # new threads begin with what was set last, wherever
        self._taken = False

    def take(self) -> None:
        """From now on the target computes with the other half of the cores."""
        if not self._streams and not self._taken:
            self._taken = True
            torch.set_num_threads(max(1, self._all - self._all // 2))
            self._pin(self._cores[: -(len(self._cores) // 2)])

    def rest(self) -> None:
        """From now on the target computes with all of them."""
        if self._taken:
            self._taken = False
            torch.set_num_threads(self._all)
            self._pin(self._cores)

    def now(self) -> Moment:
        """Called by the target: when all is done that it has handed out so far."""
        if not self._streams:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Starts work on what the target's streams have handed out so far; its result waits for all of it."""
        if not self._streams:
            return self._thread.submit(torch.inference_mode()(work))
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

        @torch.inference_mode()
        def beside() -> T:
            with ExitStack() as scope:
                for stream in reversed(self._streams):  # the first device is then the current one
                    scope.enter_context(torch.cuda.stream(stream))
                return work()

        return self._thread.submit(beside)

    def pace(self) -> None:
        """Called on the unit: returns when what it has handed out is done, so that it knows how far it is."""
        for stream in self._streams:
            stream.synchronize()

    def await_target(self) -> None:
        """Called by the target: returns when what it has handed out is done."""
        if self._streams:
            torch.cuda.current_stream(self._device).synchronize()

    def join(self) -> None:
        """Has what the target hands out from now on wait for all that the unit has."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def close(self) -> None:
        """Ends its thread."""
        self.rest()
        self._thread.shutdown()

    def _settle(self) -> None:
        torch.get_num_threads()  # PyTorch settles a thread's number when it is first asked for
        torch.set_num_threads(max(1, self._all // 2))
        self._pin(self._cores[-(len(self._cores) // 2) :])

    def _pin(self, cores: Sequence[int]) -> None:
        """Keeps this thread to some cores. Where there are more than two, threads have helpers, which stay free."""
        if len(self._cores) == 2 and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)


def seconds_between(earlier: Moment, later: Moment) -> float:
    """Of two that have come."""
    if isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event):
        return earlier.elapsed_time(later) / 1000
    assert isinstance(earlier, float)
    assert isinstance(later, float)
    return later - earlier


def cores() -> list[int]:
    """Those that this thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
