"""What the server costs: its tokens/s under load against those of an engine without one, on the same prompts.

Two child processes take turns: `LLM.generate` over all prompts at once, and `parlay serve` with a fixed number of chat
requests in flight, measured by this process as a client. Both run the same prompts to the same number of tokens with
the same engine settings. Whoever is not measured is stopped by a signal, so that its waiting threads disturb nobody.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import psutil

from parlay import LLM, EngineConfig, SamplingParams
from parlay.bench import environment, report, serving
from parlay.bench.client import Target, Wish
from parlay.bench.datasets import draw, parse_dataset
from parlay.bench.local_server import local_server
from parlay.bench.report import Spread, progress, table
from parlay.bench.serving import Planned
from parlay.bench.summary import request_results, summarise
from parlay.bench.workloads import Prompt, encode
from parlay.bets import parse_bet
from parlay.config import Compile, Dtype

BAR = 0.9  # of the engine's own throughput is what the server must reach


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over all prompts."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Overhead:
    """All results of this benchmark; runs are in the order of the repeats."""

    model: str
    prompts: int
    concurrency: int
    max_tokens: int
    speculation: str
    offline: tuple[Run, ...]
    server: tuple[Run, ...]
    ratio_of_medians: float  # of tokens/s, server over offline
    ratio: Spread  # of the repeats


@dataclass(frozen=True, slots=True)
class Work:
    """What both arms do."""

    model: str
    dtype: Dtype
    prompts: Sequence[Prompt]
    concurrency: int
    max_tokens: int
    speculation: str
    compile: Compile


def main() -> None:
    options = parse()
    captured = environment.capture()
    work = Work(
        model=options.model,
        dtype=options.dtype,
        prompts=draw(options.dataset, options.prompts, seed=0),
        concurrency=options.concurrency,
        max_tokens=options.max_tokens,
        speculation=options.speculation,
        compile=options.compile,
    )
    offline, server = measure(work, options.repeats)
    ratios = [mine.tokens_per_second / alone.tokens_per_second for alone, mine in zip(offline, server, strict=True)]
    result = Overhead(
        model=environment.portable(work.model),
        prompts=len(work.prompts),
        concurrency=work.concurrency,
        max_tokens=work.max_tokens,
        speculation=work.speculation,
        offline=tuple(offline),
        server=tuple(server),
        ratio_of_medians=median(server) / median(offline),
        ratio=Spread.of(ratios),
    )
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what to serve (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=get_args(Dtype), help="of both arms' weights (default: %(default)s)"
    )
    parser.add_argument("--dataset", type=parse_dataset, help="prompts, as for parlay bench; by default Parlay's own")
    parser.add_argument("--prompts", type=int, default=64, help="in one run (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--speculation", default="off", help="as for parlay serve (default: %(default)s)")
    parser.add_argument(
        "--compile", default="wait", choices=get_args(Compile), help="as for parlay serve (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/server_overhead.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


def measure(work: Work, repeats: int) -> tuple[list[Run], list[Run]]:
    """The runs of the engine alone and of the server, taking turns to go first, after one of each as a warm-up."""
    alone: list[Run] = []
    served: list[Run] = []
    flags = ("--speculation", work.speculation, "--compile", work.compile, "--no-prefix-caching")
    size = ("--dtype", work.dtype, "--max-num-seqs", str(work.concurrency), "--log-level", "warning")
    with engine_process(work) as (engine, generate), paused(engine):
        others = set(psutil.Process().children())
        with local_server(("-m", work.model, *flags, *size)) as url:
            [server] = set(psutil.Process().children()) - others
            target = Target(url, work.model)

            def run_alone() -> None:
                with awake(engine):
                    alone.append(generate())

            def run_served() -> None:
                with awake(server):
                    served.append(load(target, work))

            with paused(server), progress("runs of both", repeats + 1) as advance:
                for repeat in range(repeats + 1):
                    for run in (run_alone, run_served) if repeat % 2 == 0 else (run_served, run_alone):
                        run()
                    advance()
    return alone[1:], served[1:]


@contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    """Stops a process for the time of the block, except where `awake`; it goes on afterwards, so that it can end."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def awake(process: psutil.Process) -> Iterator[None]:
    """Lets a stopped process go on for the time of the block."""
    process.resume()
    try:
        yield
    finally:
        process.suspend()


def load(target: Target, work: Work) -> Run:
    """One run of the server, as its client sees it.

    Raises:
        SystemExit: when a request fails.
    """
    wish = Wish(work.max_tokens, ignore_eos=True)
    traffic = serving.send(target, wish, [Planned(prompt) for prompt in work.prompts], work.concurrency)
    if traffic.unfinished:
        raise KeyboardInterrupt
    summary = summarise(request_results(traffic), 0, False, {})
    if summary.errors:
        error = summary.errors[0]
        raise SystemExit(f"{summary.failed} requests failed: {error.kind}: {error.example}")
    return Run(summary.output_tokens, summary.seconds)


@contextmanager
def engine_process(work: Work) -> Iterator[tuple[psutil.Process, Callable[[], Run]]]:
    """An engine in a child process, and what makes it answer all prompts once.

    Raises:
        SystemExit: when the child does not get ready, or ends.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=answer_on_demand, args=(theirs, work), daemon=True)
    child.start()
    theirs.close()

    def wait() -> Any:
        try:
            return ours.recv()
        except EOFError:
            raise SystemExit("the engine's process has ended; its error is above") from None

    def generate() -> Run:
        ours.send(None)
        return wait()

    try:
        wait()
        yield psutil.Process(child.pid), generate
    finally:
        child.terminate()
        child.join()


def answer_on_demand(demands: Connection, work: Work) -> None:
    """The child: says that it is ready, then answers all prompts whenever it is asked to."""
    config = EngineConfig(
        work.model,
        dtype=work.dtype,
        max_num_seqs=work.concurrency,
        prefix_caching=False,
        speculation=parse_bet(work.speculation),
        compile=work.compile,
    )
    llm = LLM(config)
    prompts = encode(work.prompts, llm.engine.tokenizer)
    params = SamplingParams(max_tokens=work.max_tokens, temperature=0, ignore_eos=True)
    demands.send(None)
    while True:
        demands.recv()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        demands.send(Run(sum(len(output.outputs[0].token_ids) for output in outputs), seconds))


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def show(result: Overhead) -> None:
    rows = (
        (name, f"{Spread.of(run.tokens_per_second for run in runs):.1f}", runs[0].tokens)
        for name, runs in (("LLM.generate", result.offline), ("parlay serve", result.server))
    )
    title = f"{result.model}: {result.prompts} prompts, {result.concurrency} at a time, {len(result.server)} runs"
    console = report.console()
    console.print(table(title, ("", "tokens/s, median (min-max)", "tokens in a run"), rows))
    met = "met" if result.ratio_of_medians >= BAR else "missed"
    console.print(
        f"the server has {result.ratio_of_medians:.3f} of the engine's tokens/s by medians; repeats from "
        f"{result.ratio.low:.3f} to {result.ratio.high:.3f} (bar: >= {BAR:.2f}, {met})",
        highlight=False,
    )


if __name__ == "__main__":
    main()
