from __future__ import annotations

import time

import pytest
import torch

from parlay.engine import laps
from parlay.engine.laps import Laps

PARTS = ("schedule", "plan", "draft", "verify", "accept", "commit")


def run(device: str) -> Laps:
    lap = Laps(torch.device(device))
    for part in PARTS:
        time.sleep(0.002)
        lap(part)
    return lap


def test_on_the_host_parts_are_what_it_did() -> None:
    lap = run("cpu")
    assert list(lap.parts()) == [*PARTS]
    assert all(seconds >= 0.002 for seconds in lap.parts().values())
    assert sum(lap.parts().values()) == pytest.approx(lap.ended - lap.began)


def test_what_the_host_waits_for_an_accelerator_is_that_ones_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that draws for 3 ms and verifies for 5 ms, while the host hands out work and waits in `accept`."""
    clock = iter([0.0, 0.001, 0.002, 0.0025, 0.003, 0.012, 0.013])
    ends = iter([0.0, 3.0, 8.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: torch.device) -> None:
            assert stream == torch.device("cuda:1")
            self.at = next(ends)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(laps.torch.cuda, "Event", Event)
    monkeypatch.setattr(laps.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(laps.torch.cuda, "current_stream", lambda device: device)
    lap = Laps(torch.device("cuda:1"))
    for part in PARTS:
        lap(part)
    found = lap.parts()
    assert found == pytest.approx(
        {"schedule": 0.001, "plan": 0.001, "draft": 0.003, "verify": 0.005, "accept": 0.002, "commit": 0.001}
    )
    assert sum(found.values()) == pytest.approx(lap.ended - lap.began)


@pytest.mark.gpu
def test_on_a_gpu_verification_takes_as_long_as_its_work() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    work = torch.randn(4096, 4096, device="cuda")
    lap = Laps(work.device)
    lap("schedule")
    lap("plan")
    lap("draft")
    for _ in range(50):
        work = work @ work
    lap("verify")
    torch.cuda.synchronize()
    lap("accept")
    found = lap.parts()
    assert found["verify"] > 10 * found["accept"]
    assert sum(found.values()) == pytest.approx(lap.ended - lap.began, rel=0.2)
