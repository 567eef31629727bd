"""`parlay profile`: where the time of a decoding step goes, on an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parlay.bench import environment, report
from parlay.bench.report import progress
from parlay.bench.steps import Case, CaseResult, prompts_used, step_table, summarise, time_cases
from parlay.bench.workloads import encode, load_prompts
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.types import Speculation

Choice = Literal["greedy", "sampled", "both"]
NAMES: dict[Speculation, str] = {"off": "off", "auto": "on"}
SAMPLED: dict[Choice, tuple[bool, ...]] = {"greedy": (False,), "sampled": (True,), "both": (False, True)}


@dataclass(frozen=True, slots=True)
class Profile:
    """The steps of every case."""

    model: str
    dtype: str
    max_tokens: int
    repeats: int
    cases: tuple[CaseResult, ...]


def run(
    config: EngineConfig,
    *,
    rows: Sequence[int],
    choice: Choice,
    dataset: Path | None,
    max_tokens: int,
    repeats: int,
    json_to: str | None,
) -> None:
    """Times decoding steps and prints them by part, without guesses and with the configuration's bet if it has one.

    Args:
        config: What to build the engine from.
        rows: Requests at a time, one or several numbers of them.
        choice: How tokens are chosen.
        dataset: Prompts; None takes Parlay's own.
        max_tokens: New tokens per request.
        repeats: How often each case is run.
        json_to: A file, or `-` for standard output; the table then goes to standard error.

    Raises:
        ValueError: when rows do not fit into a step, or none of them decoded.
    """
    if max(rows) > config.max_num_seqs:
        raise ValueError(f"rows: {max(rows)} is more than --max-num-seqs {config.max_num_seqs}; raise that")
    methods: list[Speculation] = [method for method in NAMES if method == "off" or config.speculation is not None]
    cases = [Case(number, method, sampled) for number in rows for method in methods for sampled in SAMPLED[choice]]
    prompts = load_prompts(dataset, prompts_used(cases, repeats))
    engine = Engine(config)
    captured = environment.capture()
    with progress("timing steps", repeats * len(cases)) as advance:
        steps = time_cases(engine, encode(prompts, engine.tokenizer), cases, max_tokens, repeats, advance)
    results = tuple(summarise(case, steps[case]) for case in cases)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    profile = Profile(environment.portable(config.model), dtype, max_tokens, repeats, results)
    console = report.console(stderr=json_to == "-")
    console.print(step_table(f"{profile.model}, {dtype}: one decoding step, median ms by part", results, NAMES))
    if engine.model.device.type != "cpu":
        console.print("The device works while the host goes on: where one part waits, another one may have caused it.")
    if json_to is not None:
        environment.deliver(json_to, captured, profile)
