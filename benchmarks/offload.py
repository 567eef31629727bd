"""Layers that stream from disk: what large trees gain, beside streaming without guesses and Accelerate's own offload.

One request at a time; every program has the same budget for layers and answers the same prompts, taking turns prompt by
prompt. Counted are the steps after a prompt's own. Parlay reads past the page cache; what Accelerate has read is
dropped from the cache after every token, so that it reads from the disk as well. What passes cost is measured anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from slower_disk import add_read_rate, held_reads
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from trial import Conditions, Estimate, Tokens, add_drafters, conditions, new_engine, new_parser

from parlay.bench import environment, report
from parlay.bench.report import progress, table
from parlay.bench.workloads import encode, load_prompts
from parlay.bets import parse_bet
from parlay.engine import profiles
from parlay.engine.checkpoint import resolve
from parlay.engine.engine import Engine
from parlay.engine.streaming import Placement, size_of
from parlay.options import parse_bytes
from parlay.types import Request, SamplingParams

OFF, ACCELERATE = "off", "accelerate"
READS = 5  # times that all streamed layers are read alone


@dataclass(frozen=True, slots=True)
class Part:
    """What one answer took after its first tokens."""

    tokens: int
    steps: int
    guesses: int  # all of the answer's
    seconds: float
    bytes_read: int
    waited: float  # seconds that computing stood still for reading


@dataclass(frozen=True, slots=True)
class Line:
    """One program at one temperature.

    Attributes:
        program: A bet, or `accelerate`.
        temperature: Of its requests.
        tokens_per_second: After the first tokens.
        over_off: Seconds per token of streaming without guesses over this one's.
        tokens_per_step: Emitted by a step.
        guesses_per_step: Verified in one.
        step: Mean seconds of one.
        bytes_per_token: Read for each.
        overlap: The longer of reading alone and computing, over what a step takes.
        equal: Prompts whose greedy answer is that of streaming without guesses.
    """

    program: str
    temperature: float
    tokens_per_second: float
    over_off: Estimate
    tokens_per_step: float
    guesses_per_step: float
    step: float
    bytes_per_token: float
    overlap: float | None
    equal: int | None


@dataclass(frozen=True, slots=True)
class Offloaded(Conditions):
    """All results of this benchmark."""

    memory_budget: int
    read_rate: int | None  # bytes a second that reading was held to
    layers: int
    streamed: int
    bytes_per_step: int
    read_alone: float  # seconds that reading what a step reads takes while nothing computes
    lines: tuple[Line, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = load_prompts(options.dataset, options.limit)
    bets = [OFF, *options.bets]
    engines = made_anew(options, bets)
    tokens = encode(prompts, engines[OFF].tokenizer)
    streamed = engines[OFF].model.streamed
    if streamed is None:
        raise SystemExit("--memory-budget: all layers fit into it, so that none streams; give less")
    alone = streamed.time_reading(READS)
    programs: dict[str, Callable[[Tokens, float], tuple[Part, Tokens]]] = {
        bet: lambda prompt, heat, engine=engine: ours(engine, prompt, heat, options.max_tokens)
        for bet, engine in engines.items()
    }
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.accelerate:
            theirs = Accelerated(options, engines[OFF], Path(folder))
            programs[ACCELERATE] = lambda prompt, heat: theirs.answer(prompt, heat, options.max_tokens)
        count = len(programs) * len(prompts) * len(options.temperatures)
        with progress("answering", count) as advance:
            for heat in options.temperatures:
                parts: dict[str, list[Part]] = {name: [] for name in programs}
                said: dict[str, list[Tokens]] = {name: [] for name in programs}
                for prompt in tokens:
                    for name, answer in programs.items():
                        part, found = answer(prompt, heat)
                        parts[name].append(part)
                        said[name].append(found)
                        advance()
                lines += [line(name, heat, parts, said, alone) for name in programs]
    result = Offloaded(
        **conditions(options, prompts),
        memory_budget=options.memory_budget,
        read_rate=options.read_rate,
        layers=len(engines[OFF].model.segments.layers),
        streamed=streamed.count,
        bytes_per_step=streamed.bytes_per_pass,
        read_alone=alone,
        lines=tuple(lines),
    )
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "offload", max_tokens=48)
    usual = ("eagle:4", "eagle:16x6", "eagle:64x8", "eagle:128x10", "eagle:256x12", "auto")
    parser.add_argument("--bets", nargs="+", default=usual, help="(default: %(default)s)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=(0.0, 0.6), help="(default: %(default)s)")
    parser.add_argument("--memory-budget", type=parse_bytes, default=96 << 20, help="for layers (default: 96MiB)")
    add_read_rate(parser)
    parser.add_argument("--no-accelerate", dest="accelerate", action="store_false", help="leave Accelerate out")
    add_drafters(parser)
    return parser.parse_args()


def made_anew(options: argparse.Namespace, bets: Sequence[str]) -> dict[str, Engine]:
    """An engine for each bet, which read at no more than the given rate and know nothing of earlier measurements."""
    settings: dict[str, Any] = {"offload": "disk", "memory_budget": options.memory_budget, "max_num_seqs": 4}
    with (
        tempfile.TemporaryDirectory() as folder,
        held_reads(options.read_rate),
        patch.object(profiles, "stored", lambda engine: Path(folder) / "profile.json"),
    ):
        return {bet: new_engine(options, parse_bet(bet), compile="wait", **settings) for bet in bets}


def ours(engine: Engine, prompt: Tokens, temperature: float, max_tokens: int) -> tuple[Part, Tokens]:
    """One request's steps after its first tokens."""
    streamed = engine.model.streamed
    assert streamed is not None
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request("measured", prompt, params))
    found: list[int] = []
    began = first = steps = guesses = 0
    read, waited = 0, 0.0
    while engine.has_work:
        for delta in engine.step():
            found += delta.tokens
            guesses += delta.stats.drafted
        if found and not first:
            first, began = len(found), time.perf_counter()
            read, waited = streamed.bytes_read, streamed.seconds_waited
        elif found:
            steps += 1
    seconds = time.perf_counter() - began
    engine.forget_answers()
    read, waited = streamed.bytes_read - read, streamed.seconds_waited - waited
    return Part(len(found) - first, steps, guesses, seconds, read, waited), tuple(found)


class Accelerated:
    """transformers with the layers that do not fit left on disk by Accelerate."""

    def __init__(self, options: argparse.Namespace, beside: Engine, folder: Path) -> None:
        layers = beside.model.segments.layers
        placement = Placement.of([size_of(layer) for layer in layers], options.memory_budget)
        kept = options.memory_budget // placement.slot_bytes  # it needs no slots beside
        where: dict[str, str] = {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.norm": "cpu",
            "lm_head": "cpu",
        }
        where |= {f"model.layers.{index}": "cpu" if index < kept else "disk" for index in range(len(layers))}
        source = resolve(options.model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=beside.model.dtype, device_map=where, offload_folder=str(folder), use_safetensors=True
        ).eval()
        eos = list(beside.eos)
        self._settings = GenerationConfig(eos_token_id=None, pad_token_id=eos[0] if eos else 0)
        self._files = [*folder.iterdir(), *Path(source.path).glob("*.safetensors")]
        self._layer_bytes = (len(layers) - kept) * placement.slot_bytes
        os.sync()

    @torch.inference_mode()
    def answer(self, prompt: Tokens, temperature: float, max_tokens: int) -> tuple[Part, Tokens]:
        """One request's steps after its first token."""
        times: list[float] = []
        watch = Dropping(self._files, times)
        chance: dict[str, Any] = {"do_sample": False}
        if temperature:
            chance = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=self._settings, max_new_tokens=max_tokens,
            stopping_criteria=[watch], **chance,
        )[0, len(prompt) :].tolist()  # fmt: skip
        count = len(out) - 1
        return Part(count, count, 0, times[-1] - times[0], count * self._layer_bytes, 0.0), tuple(out)


class Dropping(StoppingCriteria):
    """Notes when each token is there, and drops files from the page cache."""

    def __init__(self, files: Sequence[Path], times: list[float]) -> None:
        self._files, self._times = files, times

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        del scores, kwargs
        self._times.append(time.perf_counter())
        for path in self._files:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def line(
    name: str, heat: float, parts: dict[str, list[Part]], said: dict[str, list[Tokens]], read_alone: float
) -> Line:
    """Sums up one program at one temperature."""
    own, off = parts[name], parts[OFF]
    tokens, steps = (sum(getattr(part, field) for part in own) for field in ("tokens", "steps"))
    seconds, waited = (sum(getattr(part, field) for part in own) for field in ("seconds", "waited"))
    step = seconds / steps
    per_token = [part.seconds / part.tokens for part in own]
    return Line(
        program=name,
        temperature=heat,
        tokens_per_second=tokens / seconds,
        over_off=Estimate.ratio([part.seconds / part.tokens for part in off], per_token),
        tokens_per_step=tokens / steps,
        guesses_per_step=sum(part.guesses for part in own) / steps,
        step=step,
        bytes_per_token=sum(part.bytes_read for part in own) / tokens,
        overlap=None if name == ACCELERATE else max(read_alone, step - waited / steps) / step,
        equal=None if heat else sum(a == b for a, b in zip(said[name], said[OFF], strict=True)),
    )


def show(result: Offloaded) -> None:
    """Prints a table for every temperature."""
    out = report.console()
    columns = (
        "program", "tokens/s", "over off", "tokens/step", "guesses/step", "step, ms", "MB read/token", "overlap",
        "equal to off",
    )  # fmt: skip
    for heat in dict.fromkeys(line.temperature for line in result.lines):
        rows = [
            (
                line.program,
                f"{line.tokens_per_second:.1f}",
                f"{line.over_off:.2f}",
                f"{line.tokens_per_step:.2f}",
                f"{line.guesses_per_step:.0f}",
                f"{1000 * line.step:.0f}",
                f"{line.bytes_per_token / 1e6:.0f}",
                "" if line.overlap is None else f"{line.overlap:.0%}",
                "" if line.equal is None else f"{line.equal} of {result.prompts}",
            )
            for line in result.lines
            if line.temperature == heat
        ]
        budget, read = f"{result.memory_budget / 2**20:.0f} MiB", f"{result.bytes_per_step / 1e6:.0f} MB a step"
        read += f" at {result.read_rate / 1e6:.0f} MB/s" if result.read_rate else ""
        streamed = (
            f"{result.streamed} of {result.layers} layers stream, {read}, alone in {1000 * result.read_alone:.0f} ms"
        )
        title = f"{result.model}, {budget} for layers: {streamed}; temperature {heat:g}"
        out.print(table(title, columns, rows))


if __name__ == "__main__":
    main()
