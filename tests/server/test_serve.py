"""`serve` from start to Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest

from parlay.config import EngineConfig
from parlay.server.app import serve
from tests.serving import engine_threads, until
from tests.tiny import make_tiny_llama


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_one_line_when_ready_and_a_calm_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = engine_threads()
    port = free_port()
    served: list[str] = []

    def answers() -> bool:
        try:
            served.append(httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"])
        except httpx.ConnectError:
            return False
        return True

    def visit_and_interrupt() -> None:
        until(answers)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit_and_interrupt, daemon=True)
    visitor.start()
    config = EngineConfig(model=str(make_tiny_llama(tmp_path)), dtype="float32", device="cpu")
    capsys.readouterr()
    serve(config, port=port, served_model_names=["tiny"])
    visitor.join()
    assert served == ["tiny"]
    assert capsys.readouterr().out == f"tiny (float32, cpu) is ready at http://127.0.0.1:{port}\n"
    assert engine_threads() == before


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(EngineConfig(model="/nowhere"), port=port)
