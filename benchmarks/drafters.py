"""Tokens per step of every drafter, by category of prompt and temperature.

Every prompt is answered once per bet, eight at a time; how many at a time changes no output and hardly what is
accepted. Counted are the steps after a prompt's own, each of which emits what was accepted and one token more. Every
guess is verified, so read it together with the guesses per step. Time is not measured here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trial import Conditions, add_drafters, conditions, new_engine, new_parser

from parlay.bench import environment, report
from parlay.bench.offline import drive
from parlay.bench.report import Advance, progress, table
from parlay.bench.workloads import Prompt, encode, load_prompts
from parlay.bets import parse_bet
from parlay.engine.engine import Engine
from parlay.types import SamplingParams, SpeculationStats


@dataclass(frozen=True, slots=True)
class Result:
    """One bet at one temperature; tokens per step by category."""

    bet: str
    temperature: float
    tokens_per_step: float  # the mean over categories
    guesses_per_step: float
    categories: dict[str, float]


@dataclass(frozen=True, slots=True)
class Results(Conditions):
    """All of them."""

    results: tuple[Result, ...]


def main() -> None:
    parser = new_parser(__doc__, "drafters", max_tokens=100)
    parser.add_argument("--bets", nargs="+", default=["prompt_lookup:4", "suffix:4", "self:4"], help="as --speculation")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7], help="(default: %(default)s)")
    add_drafters(parser)
    options = parser.parse_args()
    captured = environment.capture()
    prompts = load_prompts(options.dataset, options.limit)
    found: list[Result] = []
    with progress("answering", len(prompts) * len(options.bets) * len(options.temperatures)) as advance:
        for text in options.bets:
            engine = new_engine(options, parse_bet(text), max_num_seqs=8, seed=0)
            found += [
                score(engine, text, prompts, temperature, options.max_tokens, advance)
                for temperature in options.temperatures
            ]
    results = Results(**conditions(options, prompts), results=tuple(found))
    environment.write_json(options.json, captured, results)
    show(results)


def score(
    engine: Engine, bet: str, prompts: Sequence[Prompt], temperature: float, max_tokens: int, advance: Advance
) -> Result:
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    run = drive(engine, encode(prompts, engine.tokenizer), params, 8, advance)
    tokens: dict[str, int] = defaultdict(int)
    totals: dict[str, SpeculationStats] = defaultdict(SpeculationStats)
    for prompt, output in zip(prompts, run.outputs, strict=True):
        if output.stats.steps > 1:
            tokens[prompt.category] += len(output.tokens) - 1  # the prompt's own step emits one
            totals[prompt.category] += output.stats + SpeculationStats(steps=-1)
    means = {category: tokens[category] / stats.steps for category, stats in totals.items()}
    steps, drafted = (sum(getattr(stats, name) for stats in totals.values()) for name in ("steps", "drafted"))
    return Result(bet, temperature, sum(means.values()) / len(means), drafted / steps, means)


def show(found: Results) -> None:
    out = report.console()
    for temperature in sorted({result.temperature for result in found.results}):
        some = [result for result in found.results if result.temperature == temperature]
        columns = ("category", *(result.bet for result in some))
        rows = [(name, *(f"{r.categories.get(name, float('nan')):.2f}" for r in some)) for name in some[0].categories]
        rows.append(("mean over categories", *(f"{r.tokens_per_step:.2f}" for r in some)))
        rows.append(("guesses/step", *(f"{r.guesses_per_step:.2f}" for r in some)))
        title = f"{found.model}, {found.dataset}, {found.prompts} prompts, temperature {temperature}: tokens/step"
        out.print(table(title, columns, rows))


if __name__ == "__main__":
    main()
