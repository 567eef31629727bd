"""How many choices may wait, and when to come back when too many do."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from parlay.types import EngineStatus

WINDOW_SECONDS = 60.0  # finishes before that say nothing about how fast the server is now
LONGEST_RETRY = 60  # seconds


class QueueFull(Exception):
    """Too many choices wait already; `retry_after` is in whole seconds."""

    def __init__(self, max_waiting: int, retry_after: int) -> None:
        super().__init__(
            f"the server is busy and at most {max_waiting} choices may wait; try again in {retry_after} seconds"
        )
        self.retry_after = retry_after


class QueueLimit:
    """Refuses calls beyond what may wait.

    A call is taken whole or not at all. It is taken when all choices, those that run, those that wait and its own,
    are at most the slots that the engine runs at a time plus `max_waiting`. A call that has more choices than that by
    itself would never be taken by this rule, so it is taken when nothing waits. Any thread may ask.

    Args:
        max_waiting: Choices that may wait.
        clock: Seconds that never go back.
    """

    def __init__(self, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_waiting = max_waiting
        self._clock = clock
        self._finishes: deque[float] = deque(maxlen=256)
        self._lock = threading.Lock()  # over the finishes

    def finished(self, count: int) -> None:
        """Notes that this many choices have finished now."""
        with self._lock:
            self._finishes.extend([self._clock()] * count)

    def check(self, status: EngineStatus, choices: int) -> None:
        """Decides about a call of so many choices.

        Raises:
            QueueFull: when it is not taken.
        """
        room = status.slots + self.max_waiting
        too_many = status.running + status.waiting + choices - room
        if choices > room:
            too_many = status.waiting
        if too_many > 0:
            raise QueueFull(self.max_waiting, self._seconds_until(too_many))

    def check_any(self, status: EngineStatus) -> None:
        """Decides about a call that may have any number of choices.

        Raises:
            QueueFull: when it is not taken, however many it has.
        """
        if status.waiting > 0:
            self.check(status, 1)

    def _seconds_until(self, count: int) -> int:
        """When so many choices will have finished, if they go on finishing as they did."""
        with self._lock:
            now = self._clock()
            while self._finishes and now - self._finishes[0] > WINDOW_SECONDS:
                self._finishes.popleft()
            if not self._finishes:
                return LONGEST_RETRY
            rate = len(self._finishes) / max(now - self._finishes[0], 1.0)
        return min(max(math.ceil(count / rate), 1), LONGEST_RETRY)
