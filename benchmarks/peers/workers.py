"""The processes that `compare.py` talks to: each peer's own Python with its worker, paused unless it is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parlay.engine.checkpoint import cache_dir, pull

HERE = Path(__file__).parent
FOLDER = cache_dir() / "peers"  # where setup.sh puts everything

Prompt = tuple[int, ...]


class WorkerFailed(RuntimeError):
    """A worker that ended; the message has the last lines it wrote."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that can be measured.

    Attributes:
        name: Of its worker's file and of its environment.
        variants: Precisions, by the worker's own names.
        gguf: Whether it reads GGUF files.
    """

    name: str
    variants: tuple[str, ...]
    gguf: bool = False

    @property
    def python(self) -> Path:
        """The interpreter that runs its worker."""
        return Path(sys.executable) if self.name == OURS else FOLDER / self.name / "bin" / "python"

    @property
    def models(self) -> Path:
        """What its worker is given as `--models`."""
        return FOLDER / "models" if self.gguf else pull("smollm2-135m")


OURS = "parlay"
REFERENCE = ("transformers", "float32")  # whose texts the others are compared with
PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, ("float32", "bfloat16")),
        Peer("transformers", ("float32", "bfloat16")),
        Peer("vllm", ("float32", "bfloat16")),
        Peer("openvino", ("kv-f32", "kv-f16"), gguf=True),
        Peer("llamacpp", ("F16", "BF16", "F32"), gguf=True),
    )
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What all workers are started with; see `worker.Options`."""

    threads: int
    rows: int
    context: int
    budget: int


@dataclass(frozen=True, slots=True)
class About:
    """A worker's own words; see `worker.Loaded`."""

    peer: str
    variant: str
    precision: str
    versions: dict[str, str]
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.peer} {self.variant}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker made of one request, and how long that took it."""

    seconds: float
    tokens: tuple[tuple[int, ...], ...]


@dataclass(eq=False, slots=True)
class Worker:
    """A process with a loaded peer, stopped by a signal between requests, so that it never takes time from another.

    Args:
        peer: What to start.
        variant: Its precision.
        limits: What it must hold.

    Raises:
        WorkerFailed: when the peer cannot be loaded.
    """

    peer: Peer
    variant: str
    limits: Limits
    about: About = field(init=False)
    _log: Path = field(init=False)
    _process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._log = FOLDER / "logs" / f"{self.peer.name}-{self.variant}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.peer.python), str(HERE / f"{self.peer.name}_worker.py"), "--models", str(self.peer.models)]
        command += ["--variant", self.variant, "--threads", str(self.limits.threads), "--rows", str(self.limits.rows)]
        command += ["--context", str(self.limits.context), "--budget", str(self.limits.budget)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(self.limits.threads)},
                start_new_session=True,  # a process group, for signals to it and whatever it starts
            )
        try:
            ready = self._read()
        except BaseException:  # an interrupt goes to this process only
            self.close()
            raise
        self.about = About(self.peer.name, self.variant, ready["precision"], ready["versions"], ready["settings"])
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: Sequence[Prompt], max_tokens: int) -> Answer:
        """Has all prompts continued at once; to be called within `awake`."""
        assert self._process.stdin
        request = {"prompts": prompts, "max_tokens": max_tokens}
        with suppress(BrokenPipeError):  # the process is gone, and reading says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._read()
        return Answer(answer["seconds"], tuple(map(tuple, answer["tokens"])))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the process run for the time of the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = " / ".join(self._log.read_text(errors="replace").splitlines()[-3:])
            raise WorkerFailed(f"{self.peer.name} {self.variant} ended with status {self._process.returncode}: {last}")
        return json.loads(line)
