"""How long one pass over n new tokens takes, against transformers on the same weights.

Both continue one sequence of the same length from its KV cache and give the logits of every new token: Parlay by its
verify pass, compiled and not, transformers by its own forward with SDPA, in the type that Parlay uses and in others.
All take turns in one process. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from parlay.bench import environment, report
from parlay.bench.report import Spread, progress, table
from parlay.bets import Tree
from parlay.config import EngineConfig
from parlay.engine.batch import Draft
from parlay.engine.checkpoint import load, resolve
from parlay.engine.engine import Engine
from parlay.engine.segments import Program
from parlay.types import Request, Row, SamplingParams

BARS = {1: 2.4, 8: 2.4, 16: 2.0, 32: 1.7}  # times as fast as transformers, by new tokens
OURS = "parlay"

Pass = Callable[[int], float]  # new tokens -> seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """One program at one number of new tokens."""

    program: str
    tokens: int
    milliseconds: Spread
    ratio: Spread  # of its time over Parlay's, turn by turn
    raw_milliseconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Passes:
    """All results of this benchmark."""

    model: str
    dtype: str
    compiled: bool
    context: int
    repeats: int
    timings: tuple[Timing, ...]


def main() -> None:
    options = _options()
    captured = environment.capture()
    engine = Engine(EngineConfig(options.model, dtype=options.dtype, compile="wait"))
    dtype = str(engine.model.dtype).removeprefix("torch.")
    programs: dict[str, Pass] = {OURS: partial(_verify, engine, options.context)}
    if any(compiled := engine.model.segments.programs):
        programs[f"{OURS}, not compiled"] = partial(_verify_eager, engine, options.context, compiled)
    for name in dict.fromkeys((dtype, *options.others)):
        theirs = load(resolve(options.model), getattr(torch, name), engine.model.device, attn_implementation="sdpa")[0]
        programs[f"transformers, {name}"] = partial(_forward, theirs, options.context)
    timings = tuple(_measure(programs, options.tokens, options.repeats))
    model = environment.portable(options.model)
    result = Passes(model, dtype, any(compiled), options.context, options.repeats, timings)
    environment.write_json(options.json, captured, result)
    _show(result)


def _verify(engine: Engine, context: int, tokens: int) -> float:
    """One known token and a chain of guesses."""
    known, tree = (1,) * (context + 1), Tree.chain(tokens - 1)
    request = Request("pass", known, SamplingParams(temperature=0))
    pages = list(range(1, 2 + (context + tokens) // engine.config.page_size))
    row = Row(0, request, 0, array("i", known), len(known), context, 1, 0, tokens, pages)
    draft = Draft("pass", tree, (1,) * len(tree)) if tree else None
    began = time.perf_counter()
    scores = engine.model.verify([row], [draft])
    seconds = time.perf_counter() - began
    assert len(scores.logits) == tokens
    return seconds


def _verify_eager(engine: Engine, context: int, compiled: Sequence[Program | None], tokens: int) -> float:
    engine.model.segments.use([None] * len(compiled))
    try:
        return _verify(engine, context, tokens)
    finally:
        engine.model.segments.use(compiled)


@torch.inference_mode()
def _forward(model: Any, context: int, tokens: int) -> float:
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, context, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = torch.ones(1, tokens, dtype=torch.long)
    began = time.perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return time.perf_counter() - began


def _measure(programs: Mapping[str, Pass], sizes: Sequence[int], repeats: int) -> Iterator[Timing]:
    with progress("timing passes", len(sizes) * repeats) as advance:
        for tokens in sizes:
            seconds: dict[str, list[float]] = {name: [] for name in programs}
            for run in programs.values():
                run(tokens)  # warm-up
            for repeat in range(repeats):
                for name in list(programs)[:: 1 if repeat % 2 == 0 else -1]:
                    seconds[name].append(programs[name](tokens))
                advance()
            for name, found in seconds.items():
                ratios = (theirs / ours for theirs, ours in zip(found, seconds[OURS], strict=True))
                milliseconds = tuple(round(1000 * second, 3) for second in found)
                yield Timing(name, tokens, Spread.of(milliseconds), Spread.of(ratios), milliseconds)


def _show(result: Passes) -> None:
    rows = (
        (t.tokens, t.program, f"{t.milliseconds:.1f}", "" if t.program == OURS else f"{t.ratio:.2f}")
        for t in result.timings
    )
    columns = ("new tokens", "program", "ms (min-max)", "times Parlay's (min-max)")
    console = report.console()
    console.print(
        table(f"{result.model}, Parlay in {result.dtype}: one pass over {result.context} in KV", columns, rows, texts=2)
    )
    for tokens, bar in BARS.items():
        found = [t.ratio.median for t in result.timings if t.tokens == tokens and t.program.startswith("transformers")]
        if found:
            met = "met" if min(found) >= bar else "missed"
            console.print(
                f"{tokens} new tokens: {min(found):.2f}x as fast as transformers at its fastest "
                f"(bar: >= {bar}x, {met})",
                highlight=False,
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose passes (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="Parlay's (default: %(default)s)")
    parser.add_argument(
        "--others", nargs="*", default=["float32", "bfloat16"], help="types of transformers (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, default=128, help="tokens in KV before (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64], help="new tokens (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=11, help="turns (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/verify_pass.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
