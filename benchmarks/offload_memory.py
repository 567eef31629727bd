"""How much memory a process takes that serves a model whose layers stream from disk, by budget.

Each budget has a process of its own, which loads the model, answers one prompt and reads what the kernel says of it:
memory at the end and at most, which was while loading. What importing everything takes is measured alike and told
apart. Files that are mapped while a checkpoint is read count, though the kernel may drop them at any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from parlay.bench import environment, report
from parlay.bench.report import progress, table
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.options import parse_bytes
from parlay.types import Request, SamplingParams

RESIDENT = "resident"
ALONE = "imports alone"
TOKENS = 40


@dataclass(frozen=True, slots=True)
class Line:
    """One process, in bytes.

    Attributes:
        budget: For layers, as it was written.
        at_end: When it has answered.
        peak: At most.
    """

    budget: str
    at_end: int
    peak: int


@dataclass(frozen=True, slots=True)
class Memory:
    """All results of this benchmark."""

    model: str
    kv_memory: str
    lines: tuple[Line, ...]


def main() -> None:
    options = parse()
    if options.child is not None:
        child(options)
        return
    captured = environment.capture()
    budgets = [ALONE, RESIDENT, *options.budgets]
    lines = []
    with progress("loading and answering", len(budgets)) as advance:
        for budget in budgets:
            command = [sys.executable, __file__, "--model", options.model, "--kv-memory", options.kv_memory]
            said = subprocess.run([*command, "--child", budget], check=True, capture_output=True, text=True).stdout
            lines.append(Line(budget, *(1024 * int(number) for number in said.split()[-2:])))
            advance()
    result = Memory(environment.portable(options.model), options.kv_memory, tuple(lines))
    environment.write_json(options.json, captured, result)
    alone = lines[0].at_end
    rows = [
        (one.budget, *(f"{size / 1e6:.0f}" for size in (one.at_end, one.at_end - alone, one.peak))) for one in lines
    ]
    columns = ("memory for layers", "process, MB", "beyond imports, MB", "at most, MB")
    report.console().print(table(f"{result.model}, KV cache of {result.kv_memory}", columns, rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["96MiB", "32MiB"], help="(default: 96MiB 32MiB)")
    parser.add_argument("--kv-memory", default="64MiB", help="of the KV cache (default: %(default)s)")
    path = Path("benchmarks/results/offload_memory.json")
    parser.add_argument("--json", type=Path, default=path, help="(default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace) -> None:
    """Prints kilobytes at the end and at most."""
    if options.child != ALONE:
        streams = {} if options.child == RESIDENT else {"offload": "disk", "memory_budget": parse_bytes(options.child)}
        engine = Engine(
            EngineConfig(options.model, kv_cache_memory=parse_bytes(options.kv_memory), compile="off", **streams)
        )
        engine.add(Request("timed", tuple(range(64)), SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
        while engine.has_work:
            engine.step()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {name: text.split()[0] for name, _, text in (line.partition(":") for line in lines) if text.strip()}
    print(found["VmRSS"], found["VmHWM"])


if __name__ == "__main__":
    main()
