"""Predictive pipelined decoding: measured beside predicted, over exits and numbers of candidates.

One request at a time, greedily; all programs answer the same prompts, taking turns prompt by prompt. Plain decoding is
there twice: with the target's half of the cores, which is what the paper compares with (extra units against none), and
with all of them, which is what else the cores could do. Match rates for the prediction come from `parlay measure --ppd
--out FILE`, on prompts of its own; what the units take is measured in this run, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trial import Conditions, Estimate, Tokens, conditions, new_parser

from parlay.bench import environment, report, units
from parlay.bench.figures import check_name, legend_below, new_figure, save, title
from parlay.bench.planning_ppd import predict
from parlay.bench.report import progress, table
from parlay.bench.workloads import encode, load_prompts
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.pipelined import Pipelined, exit_of
from parlay.engine.compute_unit import Unit
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel
from parlay.policy.fixed import Off
from parlay.types import Request, SamplingParams

ALL, HALF = "plain, all cores", "plain, half of them"


@dataclass(frozen=True, slots=True)
class Line:
    """One program.

    Attributes:
        program: Its name.
        exit_layer: e; None for plain decoding, like the next four.
        candidates: k.
        matched: How often the next token was among them here.
        predicted: Milliseconds of a token.
        compute: Layers per token over those of plain decoding.
        measured: Milliseconds of a token.
        over_all: Time of plain decoding with all cores over this one's.
        over_half: The same with half of them.
        equal: Prompts whose answer is that of plain decoding.
    """

    program: str
    exit_layer: int | None
    candidates: int | None
    matched: float | None
    predicted: float | None
    compute: float | None
    measured: float
    over_all: Estimate
    over_half: Estimate
    equal: int


@dataclass(frozen=True, slots=True)
class Pipelines(Conditions):
    """All results of this benchmark."""

    times: tuple[units.Times, ...]  # before and after; predictions are means over both
    lines: tuple[Line, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    matches = chosen(options)
    prompts = load_prompts(options.dataset, options.limit)
    loaded: list[LoadedModel] = []

    def none(target: LoadedModel) -> Drafters:
        loaded.append(target)
        return Drafters([])

    engine = Engine(EngineConfig(options.model, dtype=options.dtype, prefix_caching=False, compile="wait"), none)
    exits = {source: exit_of(source, loaded[0]) for source in {match["source"] for match in matches}}
    loaded.clear()
    tokens = encode(prompts, engine.tokenizer)
    counts = sorted({match["candidates"] for match in matches})
    times = [units.measure(engine, counts)]
    unit = Unit(engine.model.devices)
    programs: dict[str, Callable[[Tokens], tuple[float, Tokens]]] = {
        ALL: lambda prompt: plain(engine, prompt, options.max_tokens),
        HALF: lambda prompt: on_half(engine, unit, prompt, options.max_tokens),
    }
    tallies: dict[str, list[tuple[int, int]]] = {}
    for match in matches:
        programs[name_of(match)] = lambda prompt, match=match: ahead(
            engine, Pipelined(match["candidates"], *exits[match["source"]]), prompt, options.max_tokens,
            tallies.setdefault(name_of(match), []),
        )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    said: dict[str, list[Tokens]] = {name: [] for name in programs}
    with progress("answering", len(programs) * len(prompts)) as advance:
        for prompt in tokens:
            for name, answer in programs.items():
                spent, found = answer(prompt)
                seconds[name].append(spent)
                said[name].append(found)
                advance()
    times.append(units.measure(engine, counts))
    by_name = {name_of(match): match for match in matches}
    both = tuple(line(name, by_name.get(name), seconds, said, tallies.get(name, ()), times) for name in programs)
    result = Pipelines(**conditions(options, prompts), times=tuple(times), lines=both)
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "ppd", max_tokens=64)
    parser.add_argument("--matches", type=Path, required=True, help="what parlay measure --ppd --out wrote")
    parser.add_argument("--exits", nargs="+", help="exits as they are named there (default: all)")
    parser.add_argument("--candidates", nargs="+", type=int, help="numbers of candidates (default: all)")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/ppd.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    check_name(options.plot)
    return options


def chosen(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The entries of the file of match rates that are wanted."""
    found = json.loads(options.matches.read_text(encoding="utf-8"))["matches"]
    return [
        match
        for match in found
        if (not options.exits or match["source"] in options.exits)
        and (not options.candidates or match["candidates"] in options.candidates)
    ]


def name_of(match: dict[str, Any]) -> str:
    return f"e = {match['exit_layer']}{', trained' if match['trained'] else ''}, k = {match['candidates']}"


def answer(engine: Engine, prompt: Tokens, max_tokens: int) -> tuple[float, Tokens]:
    """Seconds per token after the first, and the tokens."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request("measured", prompt, params))
    found: list[int] = []
    began = first = 0.0
    while engine.has_work:
        for delta in engine.step():
            found += delta.tokens
        if found and not first:
            first, began = len(found), time.perf_counter()
    return (time.perf_counter() - began) / (len(found) - first), tuple(found)


def plain(engine: Engine, prompt: Tokens, max_tokens: int) -> tuple[float, Tokens]:
    engine.policy = Off()
    return answer(engine, prompt, max_tokens)


def on_half(engine: Engine, unit: Unit, prompt: Tokens, max_tokens: int) -> tuple[float, Tokens]:
    unit.take()
    try:
        return plain(engine, prompt, max_tokens)
    finally:
        unit.rest()


def ahead(
    engine: Engine, drafter: Pipelined, prompt: Tokens, max_tokens: int, counts: list[tuple[int, int]]
) -> tuple[float, Tokens]:
    """With candidates of the next token begun; counts forks and matches."""
    with units.beginning(engine, drafter) as engine.policy:
        found = answer(engine, prompt, max_tokens)
        assert engine.model.pipeline is not None
        tally = engine.model.pipeline.tally
    counts.append((tally.forks, tally.matches))
    return found


def line(
    name: str,
    match: dict[str, Any] | None,
    seconds: dict[str, list[float]],
    said: dict[str, list[Tokens]],
    tally: list[tuple[int, int]] | tuple[()],
    times: list[units.Times],
) -> Line:
    """Sums up one program."""
    own = seconds[name]
    forks, matches = (sum(column) for column in zip(*tally, strict=True)) if tally else (0, 0)
    predicted = [predict(match, asdict(some)) for some in times] if match else []
    return Line(
        program=name,
        exit_layer=match["exit_layer"] if match else None,
        candidates=match["candidates"] if match else None,
        matched=matches / forks if forks else None,
        predicted=sum(some.milliseconds for some in predicted) / 2 if predicted else None,
        compute=predicted[0].compute if predicted else None,
        measured=1000 * sum(own) / len(own),
        over_all=Estimate.ratio(seconds[ALL], own),
        over_half=Estimate.ratio(seconds[HALF], own),
        equal=sum(a == b for a, b in zip(said[name], said[ALL], strict=True)),
    )


def show(result: Pipelines) -> None:
    """Prints the table."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    columns = (
        "program", "ms/token", "predicted", "off by", "matched", "over all cores", "over half", "compute", "equal",
    )  # fmt: skip
    rows = [
        (
            one.program,
            f"{one.measured:.2f}",
            shown(one.predicted, ".2f"),
            shown(None if one.predicted is None else one.predicted / one.measured - 1, "+.1%"),
            shown(one.matched, ".3f"),
            f"{one.over_all:.2f}",
            f"{one.over_half:.2f}",
            shown(one.compute, ".2f"),
            f"{one.equal} of {result.prompts}",
        )
        for one in result.lines
    ]
    report.console().print(table(f"{result.model}, {result.dataset}", columns, rows))


def draw(result: Pipelines, path: Path) -> None:
    """Measured beside predicted, and what a step is spent on behind each exit."""
    figure, (tokens, parts) = new_figure(2, width=5.6)
    lines = result.lines
    places = range(len(lines))[::-1]
    colours = ["#8a93a6" if line.exit_layer is None else "#2563eb" for line in lines]
    tokens.barh(places, [line.measured for line in lines], color=colours)
    begun = [(line.predicted, place) for line, place in zip(lines, places, strict=True) if line.predicted is not None]
    tokens.scatter(*zip(*begun, strict=True), s=16, color="#111827", zorder=2, label="predicted")
    tokens.set_yticks(places, [line.program for line in lines], fontsize=8)
    tokens.legend(frameon=False, loc="upper right", fontsize=8)
    title(tokens, "a token, the next one begun after e layers", "milliseconds", "")
    times, fewest = result.times[0], min(ahead.candidates for ahead in result.times[0].ahead)
    timed = [ahead for ahead in times.ahead if ahead.candidates == fewest]
    spent = {
        "until the exit": [ahead.exit for ahead in timed],
        "from there to the logits": [ahead.rest for ahead in timed],
        "waiting for the other unit": [ahead.handoff for ahead in timed],
        "all but the model": [times.host] * len(timed),
    }
    heights = [[1000 * seconds for seconds in some] for some in spent.values()]
    parts.stackplot(
        [ahead.exit_layer for ahead in timed],
        heights,
        labels=spent,
        colors=("#2563eb", "#db2777", "#d97706", "#8a93a6"),
    )
    parts.axhline(1000 * times.plain_half, color="#111827", linewidth=1, label="plain, half of the cores")
    parts.axhline(1000 * times.plain, color="#111827", linewidth=1, linestyle=":", label="plain, all of them")
    title(parts, "a step where nothing matched", "exit layer", "milliseconds")
    legend_below(figure, [parts])
    save(figure, path)


if __name__ == "__main__":
    main()
