"""Decoding steps of an engine in this process, timed by part: who runs, what is bet, verification and the rest."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from rich.table import Table

from parlay.bench.offline import drive
from parlay.bench.report import Advance, Spread, table
from parlay.engine.engine import Engine
from parlay.policy.base import Policy, PolicyRow
from parlay.types import Offer, SamplingParams, Speculation, StepPlan, StepResult

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What is decoded: so many rows, with or without guesses, greedy or sampled."""

    rows: int
    speculation: Speculation
    sampled: bool

    def params(self, max_tokens: int) -> SamplingParams:
        temperature, top_p = (0.7, 0.9) if self.sampled else (0.0, 1.0)
        return SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=temperature,
            top_p=top_p,
            speculation=self.speculation,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One step in which every row decoded."""

    rows: int
    drafted: int
    emitted: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The steps of one case over all repeats."""

    case: Case
    steps: int
    milliseconds: float  # the median step
    parts: dict[str, float]  # medians, milliseconds
    others_share: float  # of all time, what was not verification
    guesses_per_row: float
    tokens_per_step_row: float
    tokens_per_second: Spread | None  # one value per repeat; None with guesses, where the luckiest row ends the count
    raw_tokens_per_second: tuple[float, ...]
    raw_milliseconds: tuple[float, ...]


class Recorder:
    """A policy that does what another one does, and keeps the steps in which every row decodes."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps: list[Step] = []

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        return self.policy.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        self.policy.observe(rows, result)
        if all(row.count == 1 and got.emitted for row, got in zip(rows, result.rows, strict=True)):
            drafted = sum(got.drafted for got in result.rows)
            emitted = sum(len(got.emitted) for got in result.rows)
            self.steps.append(Step(len(rows), drafted, emitted, dict(result.seconds)))

    def take(self, rows: int) -> list[Step]:
        """The steps of exactly so many rows since the last call."""
        steps, self.steps = self.steps, []
        return [step for step in steps if step.rows == rows]


def prompts_used(cases: Iterable[Case], repeats: int) -> int:
    """How many prompts, from the first on, `time_cases` takes: every repeat starts one further."""
    return max(case.rows for case in cases) + repeats - 1


def time_cases(
    engine: Engine, prompts: Sequence[Tokens], cases: Sequence[Case], max_tokens: int, repeats: int, advance: Advance
) -> dict[Case, list[list[Step]]]:
    """The steps of every case, repeat by repeat; the cases take turns, in the other direction every second time.

    All prompts are read beforehand, so pass no more than `prompts_used` of them; fewer are repeated.
    """
    recorder = Recorder(engine.policy)
    engine.policy = recorder
    drive(engine, prompts, Case(4, "auto", True).params(1), 4)  # prompts are read once; what is timed is decoding
    found: dict[Case, list[list[Step]]] = {case: [] for case in cases}
    for repeat in range(repeats):
        for case in cases if repeat % 2 == 0 else cases[::-1]:
            recorder.take(0)
            chosen = list(islice(cycle(prompts), repeat, repeat + case.rows))
            drive(engine, chosen, case.params(max_tokens), case.rows)
            found[case].append(recorder.take(case.rows))
            advance()
    engine.policy = recorder.policy
    return found


def summarise(case: Case, repeats: Sequence[Sequence[Step]]) -> CaseResult:
    """Medians over all steps, and throughput by repeat.

    Raises:
        ValueError: when there was no step with so many decoding rows.
    """
    steps = [step for some in repeats for step in some]
    if not steps:
        raise ValueError(
            f"no step had {case.rows} decoding rows: raise --max-tokens, or --max-num-batched-tokens or "
            "--kv-cache-memory where so many do not fit into a step or into memory"
        )
    total = sum(step.total for step in steps)
    plain = repeats if case.speculation == "off" else ()
    throughput = tuple(sum(s.emitted for s in some) / sum(s.total for s in some) for some in plain if some)
    return CaseResult(
        case=case,
        steps=len(steps),
        milliseconds=1000 * statistics.median(step.total for step in steps),
        parts={part: 1000 * statistics.median(step.seconds[part] for step in steps) for part in steps[0].seconds},
        others_share=1 - sum(step.seconds["verify"] for step in steps) / total,
        guesses_per_row=sum(step.drafted for step in steps) / (len(steps) * case.rows),
        tokens_per_step_row=sum(step.emitted for step in steps) / (len(steps) * case.rows),
        tokens_per_second=Spread.of(throughput) if throughput else None,
        raw_tokens_per_second=throughput,
        raw_milliseconds=tuple(round(1000 * step.total, 3) for step in steps),
    )


def step_table(title: str, cases: Sequence[CaseResult], names: Mapping[Speculation, str]) -> Table:
    """One line per case: the median step by part, and what it brought.

    Args:
        title: Above the table.
        cases: At least one.
        names: What to call plain decoding (`off`) and guessing (`auto`).
    """
    parts = list(cases[0].parts)
    columns = ("rows", "speculation", "choice", "step ms", *parts, "all but verify", "tokens/row", "tokens/s (min-max)")
    rows = (
        (
            c.case.rows,
            names[c.case.speculation],
            "sampled" if c.case.sampled else "greedy",
            f"{c.milliseconds:.1f}",
            *(f"{c.parts[part]:.2f}" for part in parts),
            f"{c.others_share:.1%}",
            f"{c.tokens_per_step_row:.2f}",
            f"{c.tokens_per_second:.1f}" if c.tokens_per_second else "",
        )
        for c in cases
    )
    return table(title, columns, rows, texts=3)
