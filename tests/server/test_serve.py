"""`serve` from start to Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.server.app import serve
from parlay.types import Delta
from tests.serving import engine_threads, until
from tests.tiny import make_tiny_llama

TOKENS = 120


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def accepts(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_one_line_when_ready_and_a_calm_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: signal.Signals
) -> None:
    before = engine_threads()
    port = free_port()
    served: list[str] = []

    def visit_and_interrupt() -> None:
        until(lambda: accepts(port))
        served.append(httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"])
        os.kill(os.getpid(), end)

    visitor = threading.Thread(target=visit_and_interrupt, daemon=True)
    visitor.start()
    config = EngineConfig(model=str(make_tiny_llama(tmp_path)), dtype="float32", device="cpu")
    capsys.readouterr()
    serve(config, port=port, served_model_names=["tiny"])
    visitor.join()
    assert served == ["tiny"]
    assert capsys.readouterr().out == f"tiny (float32, cpu) is ready at http://127.0.0.1:{port}\n"
    assert engine_threads() == before


def test_what_outlasts_the_grace_is_told_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, step, steps = free_port(), Engine.step, iter(range(20))

    def stall(engine: Engine) -> Sequence[Delta]:
        time.sleep(0.005)
        return () if next(steps, None) is None else step(engine)

    monkeypatch.setattr(Engine, "step", stall)
    seen: list[str] = []

    def visit_and_terminate() -> None:
        until(lambda: accepts(port))
        body = {"prompt": "the and", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
            lines = filter(None, answer.iter_lines())
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            seen.extend(lines)

    visitor = threading.Thread(target=visit_and_terminate, daemon=True)
    visitor.start()
    config = EngineConfig(model=str(make_tiny_llama(tmp_path)), dtype="float32", device="cpu", self_check=False)
    serve(config, port=port, grace_seconds=0.2)
    visitor.join()
    assert '"code":"shutting_down"' in seen[-1]


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(EngineConfig(model="/nowhere"), port=port)


@dataclass(frozen=True, slots=True)
class Child:
    """`parlay serve` as a process of its own."""

    process: subprocess.Popen[str]
    url: str


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    port = free_port()
    program = [sys.executable, "-c", "from parlay.cli import app; app()", "serve", "--port", str(port)]
    options = ["--model", str(make_tiny_llama(tmp_path)), "--served-model-name", "tiny", "--compile", "off"]
    options += ["--dtype", "float32", "--device", "cpu", "--no-self-check", "--max-num-seqs", "8"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}  # a tiny model only loses by sharing its work
    with subprocess.Popen(
        [*program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings
    ) as process:
        try:
            assert process.stdout is not None
            assert "is ready at" in process.stdout.readline()
            yield Child(process, f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def ask(child: Child, prompts: int, texts: list[list[str]]) -> None:
    body = {"prompt": ["the and"] * prompts, "max_tokens": TOKENS, "ignore_eos": True, "speculation": "off"}
    answer = httpx.post(f"{child.url}/v1/completions", json=body, timeout=60)
    texts.append([choice["finish_reason"] for choice in answer.json()["choices"]])


def test_sigterm_lets_calls_in_flight_finish_and_refuses_new_ones(child: Child) -> None:
    body: dict[str, Any] = {"prompt": "the and", "max_tokens": TOKENS, "ignore_eos": True, "speculation": "off"}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    whole: list[list[str]] = []
    waiting = threading.Thread(target=ask, args=(child, 20, whole), daemon=True)
    idle = httpx.Client(base_url=child.url)
    with idle, httpx.stream("POST", f"{child.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        waiting.start()
        running = 'parlay:num_requests_waiting{model_name="tiny"} 0.0'
        until(lambda: running not in idle.get("/metrics").text)
        child.process.send_signal(signal.SIGTERM)
        until(lambda: refused(idle))
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"completion_tokens":' + str(TOKENS) in rest[-2]
    waiting.join()
    assert whole == [["length"] * 20]
    assert child.process.wait(60) == 0
    assert child.process.stderr is not None
    assert "Traceback" not in child.process.stderr.read()


def refused(http: httpx.Client) -> bool:
    """Whether a new request is turned away, by a closed door or in OpenAI's shape."""
    try:
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    except httpx.TransportError:
        return True
    assert answer.status_code in (200, 503)
    return answer.status_code == 503
