"""How long the parts of a step take, on the host and on an accelerator, which runs behind it."""

from __future__ import annotations

import time

import torch

BEFORE, AFTER, WAITS = "plan", ("draft", "verify"), "accept"  # parts whose ends the accelerator reports


class Laps:
    """Seconds by part of one step, from the lap before.

    An accelerator is not done when the host goes on, and waiting for it after every part would leave it without work.
    So events in its own stream say when it began and ended with guesses and with verification. Accepting reads what was
    verified, so all of them have passed by then, and what the host waited there is no time of its own. Only after steps
    that read nothing but prompts there is somebody to wait for.

    Args:
        device: Where the model runs.

    Attributes:
        began: When the step began, in seconds on `time.perf_counter`'s clock.
        ended: When its last lap did.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: dict[str, torch.cuda.Event] | None = {} if device.type == "cuda" else None
        self.began = self.ended = time.perf_counter()

    def __call__(self, part: str) -> None:
        """A part has ended."""
        now = time.perf_counter()
        self._seconds[part] = now - self.ended
        self.ended = now
        if self._events is not None and part in (BEFORE, *AFTER):
            event = self._events[part] = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))

    def parts(self) -> dict[str, float]:
        """Seconds by part; together they are the step's."""
        if self._events is None:
            return self._seconds
        found, last = dict(self._seconds), BEFORE
        self._events[AFTER[-1]].synchronize()
        for part in AFTER:
            found[part] = self._events[last].elapsed_time(self._events[part]) / 1e3
            last = part
        over = sum(found[part] - self._seconds[part] for part in AFTER)
        found[WAITS] = max(0.0, found[WAITS] - over)
        return found
