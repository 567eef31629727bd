"""`parlay serve` as a child process that never outlives the block that started it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NoReturn

import httpx

HOST = "127.0.0.1"
TAIL = 20  # lines of the log that a failure shows


class ServerFailed(OSError):
    """The server did not start; the message ends with the tail of its log."""


@contextmanager
def local_server(options: Sequence[str], timeout: float = 600) -> Iterator[str]:
    """Runs `parlay serve` with these options on a free loopback port and gives its URL once it is healthy.

    Args:
        options: Command-line options beside the address.
        timeout: Seconds that loading may take.

    Raises:
        ServerFailed: when it ends or is not healthy in time.
    """
    port = _free_port()
    command = [sys.executable, "-c", "from parlay.cli import app; app()", "serve", "--host", HOST, "--port", str(port)]
    with _terminable(), tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://{HOST}:{port}"
            _wait_until_healthy(process, url, log, timeout)
            yield url
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: IO[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with httpx.Client(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with status {process.returncode}:\n{_tail(log)}")
            try:
                if client.get(f"{url}/health").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise ServerFailed(f"the server was not ready after {timeout:.0f} s:\n{_tail(log)}")


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-TAIL:]).rstrip() or "(it said nothing)"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the stack, so that the child is ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(name, _leave) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
