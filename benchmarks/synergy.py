"""Synergy (arXiv 2310.18813) on the running engine: the best length of guesses by batch size, measured and predicted.

First every batch size is decoded with chains of 0 to 8 guesses, lengths taking turns: seconds per token of a request,
what was accepted, and the time of passes. From these follow both forms of accepted length, a line per batch size, and
the lengths that they choose, beside the measured best. A table that was profiled on one kind of task is then used for
another. With `--forced P` guesses are right with that probability whatever the drafter thinks, at the drafter's own
cost: what is left is the system. At last a server answers Gamma arrivals of several coefficients of variation under
several policies.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from serving import KEY, Bench
from trial import Conditions, add_drafters, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.figures import check_name, legend_below, look, new_figure, save, title
from parlay.bench.local_server import local_server
from parlay.bench.offline import drive
from parlay.bench.report import Advance, progress, table
from parlay.bench.steps import Recorder
from parlay.bench.workloads import Prompt, encode, load_prompts, take_turns
from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.options import parse_drafter
from parlay.policy.fixed import Fixed, Off
from parlay.policy.synergy import LengthTable, best_length, fit_independent, fit_lines, fit_power_law, regret
from parlay.types import Row, SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (0, 1, 2, 3, 4, 6, 8)
LONGEST_PROMPT = 400  # tokens, so that batches differ by their size alone
CVS = (0.5, 1.0, 2.0, 5.0)
POLICIES = ("off", "fixed:2", "fixed:4", "synergy", "auto")
SHARE = 0.5  # of capacity
WARM_UP = 4  # requests

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One length at one batch size."""

    batch: int
    length: int
    per_token: float  # seconds of a request
    accepted: float  # guesses, of a row and step
    verify: float  # median seconds of a pass
    draft: float  # median seconds of all its guesses


@dataclass(frozen=True, slots=True)
class Choice:
    """What is best at a batch size, and what the fits choose: by form of accepted length, the length and its regret."""

    batch: int
    best: int
    speedup: float  # of the best over no guesses
    chosen: dict[str, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Study:
    """A method on one kind of task."""

    name: str
    cells: tuple[Cell, ...]
    fits: dict[str, tuple[tuple[float, ...], float]]  # form -> parameters, root mean square error in guesses
    lines: dict[int, float]  # R^2 by batch size
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Synergy(Conditions):
    """All results of this benchmark."""

    method: str
    forced: float | None
    studies: tuple[Study, ...]
    crossed: dict[str, dict[int, float]]  # "profiled on A, used for B" -> regret by batch size
    arrivals: dict[str, dict[str, float]]  # CV -> policy -> mean latency in seconds


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = list(take_turns(load_prompts(options.dataset)))
    engine = new_engine(options)
    groups = {"all tasks": prompts} | {
        name: [prompt for prompt in prompts if prompt.category == name] for name in options.categories
    }
    with progress("lengths", len(groups) * len(options.batches) * len(LENGTHS) * options.repeats) as advance:
        studies = tuple(study(engine, options, name, some, advance) for name, some in groups.items())
    del engine
    result = Synergy(
        **conditions(options, prompts),
        method=options.method,
        forced=options.forced,
        studies=studies,
        crossed=dict(crossed(studies)),
        arrivals=serve(options, prompts) if options.arrivals else {},
    )
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "synergy", max_tokens=48)
    add_drafters(parser)
    parser.add_argument("--method", default="eagle", help="(default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="(default: %(default)s)")
    parser.add_argument("--categories", nargs="*", default=(), help="tasks that tables are exchanged between")
    parser.add_argument("--repeats", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--forced", type=float, help="guesses are right with this probability")
    parser.add_argument("--arrivals", type=int, default=0, help="requests of a run over HTTP; 0 for none")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/synergy.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    check_name(options.plot)
    return options


def new_engine(options: argparse.Namespace) -> Engine:
    """It keeps prompts, which are read once for all lengths."""
    sources: Mapping[str, str] = dict(map(parse_drafter, options.drafter))
    bet = Bet(options.method, Tree.chain(max(LENGTHS)))
    return Engine(
        EngineConfig(
            options.model, dtype=options.dtype, speculation=bet, drafters=sources, compile="wait",
            max_num_seqs=max(options.batches),
        )
    )  # fmt: skip


# ---- lengths --------------------------------------------------------------------------------------------------------


def study(engine: Engine, options: argparse.Namespace, name: str, prompts: Sequence[Prompt], advance: Advance) -> Study:
    """Measures every length at every batch size, and what the model makes of it."""
    ids = [some for some in encode(prompts, engine.tokenizer) if len(some) <= LONGEST_PROMPT]
    found: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for batch in options.batches:
        some = [ids[place % len(ids)] for place in range(batch)]
        texts = plain_texts(engine, some, options.max_tokens) if options.forced is not None else {}
        for repeat in range(options.repeats):
            for place in range(len(LENGTHS)):
                length = LENGTHS[(place + repeat) % len(LENGTHS)]
                found[batch, length].append(measure(engine, options, some, length, texts))
                advance()
    cells = tuple(median(some) for some in found.values())
    return Study(name, cells, *model(cells, options.batches))


def plain_texts(engine: Engine, prompts: Sequence[Tokens], tokens: int) -> dict[str, Tokens]:
    """What each request will say, and a little more."""
    engine.policy = Off()
    params = SamplingParams(temperature=0, max_tokens=tokens + max(LENGTHS), ignore_eos=True)
    run = drive(engine, prompts, params, len(prompts))
    return {str(number): output.tokens for number, output in enumerate(run.outputs)}


def measure(
    engine: Engine, options: argparse.Namespace, prompts: Sequence[Tokens], length: int, texts: Mapping[str, Tokens]
) -> Cell:
    """Decodes a batch with one length; only steps count in which all rows decode with all their guesses."""
    watch = Recorder(Fixed(options.method, Tree.chain(length)) if length else Off())
    engine.policy = watch
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True)
    drafter = engine.drafters.by_name[options.method]
    honest = drafter.draft
    if options.forced is not None:
        chance = random.Random(f"{len(prompts)} {length}")
        drafter.draft = lambda rows, bets, budget: [  # type: ignore[method-assign]
            draft and forced(draft, row, texts[row.request.id], options.forced, chance)
            for draft, row in zip(honest(rows, bets, budget), rows, strict=True)
        ]
    try:
        drive(engine, prompts, params, len(prompts))
    finally:
        drafter.draft = honest  # type: ignore[method-assign]
    batch = len(prompts)
    steps = [step for step in watch.take(batch) if step.drafted == batch * length]
    emitted = sum(step.emitted for step in steps)
    return Cell(
        batch=batch,
        length=length,
        per_token=sum(step.total for step in steps) * batch / emitted,
        accepted=emitted / batch / len(steps) - 1,
        verify=statistics.median(step.seconds["verify"] for step in steps),
        draft=statistics.median(step.seconds["draft"] for step in steps) if length else 0.0,
    )


def forced(draft: Draft, row: Row, text: Tokens, right: float, chance: random.Random) -> Draft:
    """The same guesses, each of them right with this probability."""
    done = row.length - len(row.request.prompt)
    true = text[done : done + len(draft.tree)]
    tokens = [token if chance.random() < right else token ^ 1 for token in true]
    return replace(draft, tokens=tuple(tokens) + draft.tokens[len(tokens) :])


def median(cells: Sequence[Cell]) -> Cell:
    """The repeats of a cell."""
    numbers = ("per_token", "accepted", "verify", "draft")
    return replace(cells[0], **{name: statistics.median(getattr(cell, name) for cell in cells) for name in numbers})


def model(cells: Sequence[Cell], batches: Sequence[int]) -> tuple[Any, Any, tuple[Choice, ...]]:
    """Fits Synergy's model, and compares the lengths that it chooses with the best."""
    by_place = {(cell.batch, cell.length): cell for cell in cells}
    lengths = np.array(LENGTHS[1:], dtype=float)
    accepted = np.array([float(np.mean([by_place[b, s].accepted for b in batches])) for s in LENGTHS[1:]])
    forms = {"power law": fit_power_law(lengths, accepted), "independent": fit_independent(lengths, accepted)}
    lines = fit_lines(
        np.array(LENGTHS, dtype=float), {b: np.array([by_place[b, s].verify for s in LENGTHS]) for b in batches}
    )
    choices = []
    for batch in batches:
        slope, start, _ = lines[batch]
        host = statistics.median(_host(by_place[batch, s]) for s in LENGTHS)
        draft = statistics.median(by_place[batch, s].draft / s for s in LENGTHS[1:])
        chosen = {}
        for form, fit in forms.items():
            length = best_length(batch, max(LENGTHS), fit, lambda _, s: host + start + slope * s, draft)  # noqa: B023
            nearest = min(LENGTHS, key=lambda some: (abs(some - length), some))
            measured = [by_place[batch, s].per_token for s in LENGTHS]
            chosen[form] = nearest, regret(measured, LENGTHS.index(nearest))
        times = {s: by_place[batch, s].per_token for s in LENGTHS}
        best = min(times, key=lambda s: times[s])
        choices.append(Choice(batch, best, times[0] / times[best], chosen))
    fits = {form: (fit.parameters, fit.error) for form, fit in forms.items()}
    return fits, {batch: line[2] for batch, line in lines.items()}, tuple(choices)


def _host(cell: Cell) -> float:
    """Seconds of a step that are neither pass nor guesses."""
    return cell.per_token * (1 + cell.accepted) - cell.verify - cell.draft


def crossed(studies: Sequence[Study]) -> Any:
    """Tables of one kind of task, used for another."""
    for profiled in studies[1:]:
        tables = LengthTable({choice.batch: choice.best for choice in profiled.choices})
        for used in studies[1:]:
            if used is not profiled:
                regrets = {}
                for choice in used.choices:
                    measured = {cell.length: cell.per_token for cell in used.cells if cell.batch == choice.batch}
                    regrets[choice.batch] = measured[tables[choice.batch]] / min(measured.values()) - 1
                yield f"profiled on {profiled.name}, used for {used.name}", regrets


# ---- arrivals -------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """Mean latency over HTTP by coefficient of variation of the gaps and by policy, all with the same prompts."""
    drafters = [part for source in options.drafter for part in ("--drafter", source)]
    settings = ("--model", options.model, "--no-prefix-caching", "--compile", "wait", "--log-level", "warning")
    found: dict[str, dict[str, float]] = {}
    with local_server((*settings, *drafters, "--api-key", KEY)) as url, progress("arrivals", len(CVS)) as advance:
        bench = Bench(url, options.model, options.max_tokens, 64)
        for policy in POLICIES:
            bench.run(policy, prompts[:WARM_UP], [0.0] * WARM_UP)
        whole = bench.run("off", prompts[: options.arrivals], [0.0] * options.arrivals)
        rate = SHARE * options.arrivals / max(answer.latency for answer in whole)
        for number, cv in enumerate(CVS):
            gaps = np.random.default_rng(0).gamma(1 / cv**2, cv**2 / rate, options.arrivals - 1)
            times = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
            first = number % len(POLICIES)
            latency = {
                policy: statistics.mean(a.latency for a in bench.run(policy, prompts[: options.arrivals], times))
                for policy in (*POLICIES[first:], *POLICIES[:first])
            }
            found[f"{cv:g}"] = {policy: latency[policy] for policy in POLICIES}
            advance()
    return found


# ---- report ---------------------------------------------------------------------------------------------------------


def show(result: Synergy) -> None:
    """Prints the tables."""
    out = report.console()
    for found in result.studies:
        times = {(cell.batch, cell.length): cell for cell in found.cells}
        forms = list(found.fits)
        rows = [
            (
                str(choice.batch),
                *(f"{1e3 * times[choice.batch, s].per_token:.2f}" for s in LENGTHS),
                str(choice.best),
                f"{choice.speedup:.2f}x",
                *(f"{choice.chosen[form][0]} ({choice.chosen[form][1]:+.1%})" for form in forms),
            )
            for choice in found.choices
        ]
        columns = ("batch", *(f"{s} guesses" for s in LENGTHS), "best", "over off", *forms)
        about = "" if result.forced is None else f", guesses right with probability {result.forced:g} (forced)"
        out.print(table(f"{result.method}, {found.name}{about}: ms per token of a request", columns, rows))
        for form, (parameters, error) in found.fits.items():
            values = ", ".join(f"{value:.3f}" for value in parameters)
            out.print(f"accepted length, {form}: {values}; off by {error:.3f} guesses", highlight=False)
        worst = min(found.lines.values())
        out.print(f"a pass is a line in its guesses with R^2 of {worst:.3f} or more", highlight=False)
    for name, regrets in result.crossed.items():
        text = ", ".join(f"{batch}: {worse:+.1%}" for batch, worse in regrets.items())
        out.print(f"table {name}: {text}", highlight=False)
    if result.arrivals:
        rows = [(cv, *(f"{some[policy]:.3f}" for policy in POLICIES)) for cv, some in result.arrivals.items()]
        out.print(table("mean latency of a request in seconds, Gamma arrivals", ("CV of gaps", *POLICIES), rows))


def draw(result: Synergy, path: Path) -> None:
    """Time per token by length for every batch size, and the best length by batch size."""
    figure, (times, best) = new_figure(2, width=5.2)
    found = result.studies[0]
    styles = look([f"fixed:{number}" for number in range(1, len(found.choices) + 1)])
    for style, choice in zip(styles.values(), found.choices, strict=True):
        cells = [cell for cell in found.cells if cell.batch == choice.batch]
        plain = next(cell.per_token for cell in cells if cell.length == 0)
        points = sorted((cell.length, cell.per_token / plain) for cell in cells)
        times.plot(*zip(*points, strict=True), label=f"batch {choice.batch}", **style)
    times.axhline(1.0, color="#8a93a6", linewidth=1)
    batches = [choice.batch for choice in found.choices]
    best.plot(batches, [choice.best for choice in found.choices], "o-", label="measured best")
    for form, dash in zip(found.fits, ("--", ":"), strict=True):
        best.plot(batches, [choice.chosen[form][0] for choice in found.choices], dash, label=form)
    best.set_xscale("log", base=2)
    title(times, f"{result.method}: time per token", "guesses", "over that without guesses")
    title(best, "best length", "batch", "guesses")
    legend_below(figure, [times, best])
    save(figure, path)


if __name__ == "__main__":
    main()
