"""How often greedy outputs change when prompt lookup is on, and what it costs to rule that out.

The same prompts are decoded greedily with and without prompt lookup, with fast and with strict parity, at several
loads, all arms taking turns. Outputs are compared token by token up to their first difference. In fast parity
near-ties may flip, because low-precision sums round differently in batches of other shapes, so that even plain
decoding differs from itself at another load. In strict parity nothing may differ: the exit status is 1 if it does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parlay.bench import environment, report
from parlay.bench.offline import Run, drive
from parlay.bench.report import Advance, Spread, progress, table
from parlay.bench.workloads import encode, load_prompts
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.types import SamplingParams, Speculation

Parity = Literal["fast", "strict"]
PARITIES: tuple[Parity, ...] = ("fast", "strict")
METHODS: dict[Speculation, str] = {"off": "off", "auto": "prompt_lookup:4"}

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode the prompts."""

    parity: Parity
    speculation: Speculation
    concurrency: int

    def __str__(self) -> str:
        return f"{self.parity}, {METHODS[self.speculation]}, {self.concurrency} at a time"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two arms' outputs, compared up to the first difference of each."""

    left: Arm
    right: Arm
    outputs: int
    differing: int
    tokens: int  # compared, the first different ones included
    first_differences: tuple[int, ...]  # output positions

    @property
    def by_output(self) -> float:
        return self.differing / self.outputs

    @property
    def by_token(self) -> float:
        return self.differing / self.tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """An arm's throughput, one value per repeat."""

    arm: Arm
    tokens_per_second: tuple[float, ...]
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Price:
    """Strict over fast throughput of the same load, repeat by repeat."""

    speculation: Speculation
    concurrency: int
    ratio: Spread


@dataclass(frozen=True, slots=True)
class ParityResult:
    """All results of this benchmark."""

    model: str
    dtype: str
    dataset: str
    prompts: int
    max_tokens: int
    mismatches: tuple[Mismatch, ...]
    speeds: tuple[Speed, ...]
    prices: tuple[Price, ...]

    @property
    def strict_holds(self) -> bool:
        return not any(m.differing for m in self.mismatches if m.left.parity == "strict")


def main() -> None:
    options = parse()
    captured = environment.capture()
    loaded = load_prompts(options.dataset, options.limit)
    engines: dict[Parity, Engine] = {parity: build(options, parity) for parity in PARITIES}
    prompts = encode(loaded, engines["fast"].tokenizer)
    loads: list[tuple[Speculation, int]] = [(method, count) for count in options.concurrency for method in METHODS]
    arms = [Arm(parity, method, count) for method, count in loads for parity in PARITIES]
    with progress("decoding", options.repeats * len(arms) * len(prompts)) as advance:
        runs = decode(engines, prompts, arms, options.max_tokens, options.repeats, advance)
    result = ParityResult(
        model=environment.portable(options.model),
        dtype=str(engines["fast"].model.dtype).removeprefix("torch."),
        dataset=options.dataset.name if options.dataset else "parlay's own prompts",
        prompts=len(prompts),
        max_tokens=options.max_tokens,
        mismatches=tuple(compare(*pair, runs) for pair in pairs(options.concurrency)),
        speeds=tuple(speed(arm, some) for arm, some in runs.items()),
        prices=tuple(price(method, count, runs) for method, count in loads),
    )
    environment.write_json(options.json, captured, result)
    show(result)
    sys.exit(not result.strict_holds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what to decode with (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of its weights (default: %(default)s)")
    parser.add_argument(
        "--dataset", type=Path, help="prompts, JSON lines with prompt or Spec-Bench's turns; by default Parlay's own"
    )
    parser.add_argument("--limit", type=int, help="use this many prompts, the categories taking turns")
    parser.add_argument("--max-tokens", type=int, default=64, help="output limit per prompt (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8], help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="times each arm is run (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/parity.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


def build(options: argparse.Namespace, parity: Parity) -> Engine:
    """An engine that pays for every prompt anew, so that repeats are alike."""
    return Engine(EngineConfig(options.model, dtype=options.dtype, parity=parity, prefix_caching=False, compile="wait"))


def decode(
    engines: Mapping[Parity, Engine],
    prompts: Sequence[Tokens],
    arms: Sequence[Arm],
    max_tokens: int,
    repeats: int,
    advance: Advance,
) -> dict[Arm, list[Run]]:
    """Every arm's runs; the arms take turns, in the other direction every second time."""
    for engine in engines.values():
        drive(engine, prompts[:4], SamplingParams(temperature=0, max_tokens=8), 4)  # warm-up
    runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, speculation=arm.speculation)
            runs[arm].append(drive(engines[arm.parity], prompts, params, arm.concurrency, advance))
    return runs


def pairs(concurrencies: Sequence[int]) -> Iterator[tuple[Arm, Arm]]:
    """What is compared: guesses on or off at every load, and plain decoding at one load with that at another."""
    for parity in PARITIES:
        for concurrency in concurrencies:
            yield Arm(parity, "off", concurrency), Arm(parity, "auto", concurrency)
        for other in concurrencies[1:]:
            yield Arm(parity, "off", concurrencies[0]), Arm(parity, "off", other)


def compare(left: Arm, right: Arm, runs: Mapping[Arm, Sequence[Run]]) -> Mismatch:
    """All repeats, each against its counterpart."""
    firsts: list[int] = []
    outputs = tokens = 0
    for ours, theirs in zip(runs[left], runs[right], strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            first = first_difference(one.tokens, other.tokens)
            outputs += 1
            tokens += len(one.tokens) if first is None else first + 1
            firsts += [] if first is None else [first]
    return Mismatch(left, right, outputs, len(firsts), tokens, tuple(firsts))


def first_difference(one: Tokens, other: Tokens) -> int | None:
    """Where two outputs part; an output that ends early parts from the longer one at its end."""
    if one == other:
        return None
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def speed(arm: Arm, runs: Sequence[Run]) -> Speed:
    steps = sum(output.stats.steps for run in runs for output in run.outputs)
    tokens = sum(run.num_tokens for run in runs)
    return Speed(arm, tuple(run.tokens_per_second for run in runs), tokens / max(1, steps))


def price(speculation: Speculation, concurrency: int, runs: Mapping[Arm, Sequence[Run]]) -> Price:
    fast, strict = (runs[Arm(parity, speculation, concurrency)] for parity in PARITIES)
    ratios = (s.tokens_per_second / f.tokens_per_second for f, s in zip(fast, strict, strict=True))
    return Price(speculation, concurrency, Spread.of(ratios))


def show(result: ParityResult) -> None:
    console = report.console()
    console.print(
        table("first differences", ("compared", "with", "outputs", "per token"), differences(result), texts=2)
    )
    strict = {(p.speculation, p.concurrency): p.ratio for p in result.prices}
    rows = (
        (
            s.arm.concurrency,
            METHODS[s.arm.speculation],
            s.arm.parity,
            f"{Spread.of(s.tokens_per_second):.1f}",
            f"{s.tokens_per_step:.2f}",
            f"{strict[s.arm.speculation, s.arm.concurrency]:.2f}" if s.arm.parity == "strict" else "",
        )
        for s in sorted(result.speeds, key=lambda s: (s.arm.concurrency, s.arm.speculation != "off"))
    )
    columns = ("at a time", "speculation", "parity", "tokens/s (min-max)", "tokens per step", "of fast (min-max)")
    console.print(table(f"{result.model}, {result.dtype}: speed", columns, rows, texts=3))
    verdict = "holds: no output differs" if result.strict_holds else "IS BROKEN: outputs differ"
    console.print(f"strict parity {verdict}", highlight=False)


def differences(result: ParityResult) -> Iterable[tuple[object, ...]]:
    for m in result.mismatches:
        yield m.left, m.right, f"{m.differing} of {m.outputs} ({m.by_output:.1%})", f"{m.by_token:.3%}"


if __name__ == "__main__":
    main()
