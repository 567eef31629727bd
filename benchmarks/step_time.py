"""Where the time of a step goes, and how plain decoding compares with transformers' own `generate`.

Decoding steps are timed by part for several numbers of rows, plain and with prompt lookup, greedy and sampled. Plain
decoding of one request is then timed against `transformers.generate` on the same weights, the two taking turns.
Run it on an otherwise idle machine. Times by part mean something on CPU only: a GPU works while the host goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parlay.bench import environment, report
from parlay.bench.offline import drive
from parlay.bench.report import Spread, progress
from parlay.bench.steps import Case, CaseResult, Tokens, prompts_used, step_table, summarise, time_cases
from parlay.bench.workloads import encode, load_prompts
from parlay.config import EngineConfig
from parlay.engine.checkpoint import load, resolve
from parlay.engine.engine import Engine
from parlay.engine.products import PackedLinear
from parlay.types import Speculation

HOST_BAR = 0.12  # of a step of MOST_ROWS rows may go to anything but verification
SAMPLING_BAR = 0.15  # and to choosing tokens
SCALING_BAR = 6.0  # times the throughput of one request
MOST_ROWS = 16
METHODS: dict[Speculation, str] = {"off": "off", "auto": "prompt lookup"}


@dataclass(frozen=True, slots=True)
class Versus:
    """Plain greedy decoding of one request at a time, Parlay against transformers; one entry per repeat."""

    new_tokens: int
    parlay_seconds: tuple[float, ...]
    transformers_seconds: tuple[float, ...]
    ratio_of_medians: float  # above 1: Parlay is faster
    ratio: Spread
    equal_outputs: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """All results of this benchmark."""

    model: str
    dtype: str
    prompt_tokens: float  # mean over the prompts
    max_tokens: int
    repeats: int
    cases: tuple[CaseResult, ...]
    scaling: float | None  # plain greedy throughput of the most rows over that of one
    products: dict[int, float] | None  # by rows: milliseconds of a step's matrix products alone; None on a GPU
    versus: Versus | None


def main() -> None:
    options = parse()
    captured = environment.capture()
    cases = [Case(rows, method, sampled) for rows in options.rows for method in METHODS for sampled in (False, True)]
    config = EngineConfig(options.model, dtype=options.dtype, compile="wait")
    engine = Engine(config)
    comparisons = max(5, options.repeats)
    used = max(prompts_used(cases, options.repeats), comparisons)
    prompts = [
        prompt[: options.prompt_tokens] for prompt in encode(load_prompts(options.dataset, used), engine.tokenizer)
    ]
    with progress("timing steps", options.repeats * len(cases)) as advance:
        steps = time_cases(engine, prompts, cases, options.max_tokens, options.repeats, advance)
    products = time_products(engine, (1, MOST_ROWS), 4 * options.repeats)
    versus = None
    if not options.no_transformers:
        del engine
        engine = Engine(replace(config, prefix_caching=False))  # both programs read every prompt
        versus = compare(engine, options.model, prompts, options.max_tokens, comparisons)
    try:
        summaries = tuple(summarise(case, steps[case]) for case in cases)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    dtype = str(engine.model.dtype).removeprefix("torch.")
    model = environment.portable(options.model)
    factor = scaling(summaries)
    length = statistics.mean(map(len, prompts))
    result = StepTimes(model, dtype, length, options.max_tokens, options.repeats, summaries, factor, products, versus)
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what to serve (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of both programs' weights (default: %(default)s)")
    parser.add_argument("--dataset", type=Path, help="prompts, JSON lines; by default Parlay's own")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, MOST_ROWS], help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, help="cut prompts to so many tokens (default: whole prompts)")
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens per request (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times each case is run (default: %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="leave out the comparison with transformers")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/step_time.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


def scaling(cases: Iterable[CaseResult]) -> float | None:
    """Plain greedy throughput of the most rows over that of one; None where one of them was not measured."""
    plain = {c.case.rows: c.tokens_per_second.median for c in cases if c.tokens_per_second and not c.case.sampled}
    return plain[MOST_ROWS] / plain[1] if {1, MOST_ROWS} <= plain.keys() else None


@torch.inference_mode()
def time_products(engine: Engine, rows: Sequence[int], repeats: int) -> dict[int, float] | None:
    """Median milliseconds of all packed products of a step, by rows: what would be left if all else took no time."""
    layers = [layer for layer in engine.model.segments.model.modules() if isinstance(layer, PackedLinear)]
    if not layers:
        return None
    inputs = {
        count: [torch.randn(count, layer.weight.shape[1], dtype=engine.model.dtype) for layer in layers]
        for count in rows
    }
    seconds: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repeats):
        for count in rows:
            began = time.perf_counter()
            for layer, x in zip(layers, inputs[count], strict=True):
                layer.forward(x)  # without the hook that the head has
            seconds[count].append(time.perf_counter() - began)
    return {count: 1000 * statistics.median(some) for count, some in seconds.items()}


def compare(engine: Engine, model: str, prompts: Sequence[Tokens], new_tokens: int, repeats: int) -> Versus:
    """Times whole requests, prompt included, one at a time, the two programs taking turns to go first."""
    theirs = load_transformers(model, engine)
    params = Case(1, "off", False).params(new_tokens)

    def ours(prompt: Tokens) -> tuple[float, Tokens]:
        run = drive(engine, [prompt], params, 1)
        return run.seconds, run.outputs[0].tokens

    def reference(prompt: Tokens) -> tuple[float, Tokens]:
        began = time.perf_counter()
        tokens = generate(theirs, prompt, new_tokens)
        return time.perf_counter() - began, tokens

    for program in (ours, reference):
        program(prompts[0])  # warm-up
    seconds: tuple[list[float], list[float]] = ([], [])
    equal = 0
    with progress("against transformers", repeats) as advance:
        for prompt in (prompts[repeat % len(prompts)] for repeat in range(repeats)):
            order = (ours, reference) if len(seconds[0]) % 2 == 0 else (reference, ours)
            timed = {run: run(prompt) for run in order}
            seconds[0].append(timed[ours][0])
            seconds[1].append(timed[reference][0])
            equal += timed[ours][1] == timed[reference][1]
            advance()
    return Versus(
        new_tokens=new_tokens,
        parlay_seconds=tuple(seconds[0]),
        transformers_seconds=tuple(seconds[1]),
        ratio_of_medians=statistics.median(seconds[1]) / statistics.median(seconds[0]),
        ratio=Spread.of(their / our for our, their in zip(*seconds, strict=True)),
        equal_outputs=equal,
    )


def load_transformers(model: str, engine: Engine) -> Any:
    """An instance of its own, with transformers' default attention, that goes on after the end of a text."""
    theirs, _ = load(resolve(model), engine.model.dtype, engine.model.device, attn_implementation="sdpa")
    assert theirs.generation_config is not None
    theirs.generation_config.eos_token_id = None
    return theirs


@torch.inference_mode()
def generate(model: Any, prompt: Tokens, new_tokens: int) -> Tokens:
    """Greedy decoding by transformers."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )
    return tuple(out[0, len(prompt) :].tolist())


def show(result: StepTimes) -> None:
    console = report.console()
    title = f"{result.model}, {result.dtype}, prompts of {result.prompt_tokens:.0f} tokens: median ms of a step by part"
    console.print(step_table(title, result.cases, METHODS))
    for line in verdicts(result):
        console.print(line, highlight=False)


def verdicts(result: StepTimes) -> Iterable[str]:
    """The bars, and whether they were met."""
    busiest = [c for c in result.cases if c.case.rows == MOST_ROWS]
    if busiest:
        worst = max(c.others_share for c in busiest)
        bar = f"(bar: <= {HOST_BAR:.0%}, {met(worst <= HOST_BAR)})"
        yield f"all but verify at {MOST_ROWS} rows: at most {worst:.1%} {bar}"
        choosing = max(c.parts["accept"] / c.milliseconds for c in busiest if c.case.sampled)
        bar = f"(bar: <= {SAMPLING_BAR:.0%}, {met(choosing <= SAMPLING_BAR)})"
        yield f"choosing tokens in a sampled step of {MOST_ROWS} rows: at most {choosing:.1%} {bar}"
    if result.scaling is not None:
        bar = f"(bar: >= {SCALING_BAR:.0f}x, {met(result.scaling >= SCALING_BAR)})"
        yield f"plain decode throughput at {MOST_ROWS} over 1: {result.scaling:.1f}x {bar}"
    if result.products is not None:
        one, many = result.products[1], result.products[MOST_ROWS]
        yield (
            f"matrix products alone: {one:.1f} ms for 1 row and {many:.1f} ms for {MOST_ROWS}, so that it would be "
            f"{MOST_ROWS * one / many:.1f}x if all else took no time"
        )
    if (versus := result.versus) is not None:
        yield (
            f"plain decoding, one request of {versus.new_tokens} new tokens, against transformers.generate: "
            f"{versus.ratio_of_medians:.2f}x as fast by medians; repeats from {versus.ratio.low:.2f}x to "
            f"{versus.ratio.high:.2f}x; {versus.equal_outputs} of {len(versus.parlay_seconds)} outputs equal"
        )


def met(passed: bool) -> str:
    return "met" if passed else "missed"


if __name__ == "__main__":
    main()
