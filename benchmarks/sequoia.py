"""Sequoia's planned trees, in memory and with layers streaming from disk, against the trees that others bet.

How often guesses are accepted is measured on some prompts as `parlay measure` does it, and what steps cost by the
calibration of an engine, on each of the two machines. From both follow the size, the depth and the tree that should
emit most tokens per second (`parlay.policy.planner`). On other prompts it is compared with plain decoding, chains,
SpecInfer's chains with SpecInfer's sampling, and top-k in the same tree, one request at a time; of chains and of
SpecInfer's several sizes are tried, and the fastest counts. Speeds are of steps after the prompt has been read, by the
drafter as well.

At one setting many other best trees are timed, too: regret is what the planned one is slower than the fastest of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from predicted_tokens import read_shape
from sequoia_trees import (
    CHAIN,
    CHAINS,
    SEQUOIA,
    SPECINFER,
    TOPK,
    Line,
    Machine,
    Predictions,
    Regret,
    Setting,
    Turns,
    competitors,
    costs,
    grid,
    machines,
    shape,
)
from slower_disk import add_read_rate, held_reads
from trial import Conditions, acceptance, add_trees, comb_engine, conditions, measure, new_parser

from parlay.bench import environment, report
from parlay.bench.figures import check_name, draw_tree, legend_below, new_figure, save, title
from parlay.bench.measuring import Counts
from parlay.bench.report import progress, table
from parlay.bench.workloads import Prompt, encode, load_prompts
from parlay.bets import Tree
from parlay.engine.engine import Engine
from parlay.options import parse_bytes
from parlay.policy.cost import Profile
from parlay.policy.planner import Planner
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import Floats, levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTH = 12  # of planned trees
BAR = 0.03  # of regret
SWEPT = (CHAIN, CHAINS, SPECINFER, TOPK)  # families that the planned tree is compared with
COLOURS = {SEQUOIA: "#2563eb", TOPK: "#0f9d8a", CHAIN: "#8b5cf6", CHAINS: "#db2777", SPECINFER: "#d97706"}
MACHINE_COLOURS = ("#111827", "#4d7c0f")
COLUMNS = (
    *("program", "guesses", "levels", "F(T)", "tokens/step (95%)", "step, ms, predicted", "step, ms", "tokens/s"),
    *("over off, predicted", "over off (95%)", "Sequoia over it (95%)"),
)


@dataclass(frozen=True, slots=True)
class Round:
    """One setting on one machine."""

    setting: Setting
    planned: tuple[int, ...]  # parents
    widths: tuple[int, ...]  # of its levels
    lines: tuple[Line, ...]
    regret: Regret | None

    def best(self, family: str) -> Line | None:
        """The family's fastest, which favours families with several sizes."""
        some = [line for line in self.lines if line.family == family]
        return max(some, key=lambda line: line.tokens_per_second, default=None)


@dataclass(frozen=True, slots=True)
class OnMachine:
    """What one machine showed."""

    name: str
    profile: Profile
    median_error: float  # of the profile, at shapes that were held out
    worst_error: float
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Sequoia(Conditions):
    """All results of this benchmark."""

    method: str
    memory_budget: int  # bytes for layers of the second machine
    read_rate: int | None  # bytes a second that its reading was held to
    acceptance_prompts: int
    settings: tuple[Setting, ...]
    acceptance: tuple[list[list[float]], ...]  # by setting, level and child
    machines: tuple[OnMachine, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    measured_on, prompts = split(load_prompts(options.dataset), options.limit, options.acceptance_prompts)
    engine = comb_engine(options)
    context = int(np.mean([len(tokens) for tokens in encode(measured_on, engine.tokenizer)])) + options.max_tokens // 2
    matrices = {setting: accepted(engine, options, measured_on, setting) for setting in options.settings}
    del engine
    result = Sequoia(
        **conditions(options, prompts),
        method=options.method,
        memory_budget=options.memory_budget,
        read_rate=options.read_rate,
        acceptance_prompts=len(measured_on),
        settings=tuple(matrices),
        acceptance=tuple(matrix.round(4).tolist() for matrix in matrices.values()),
        machines=tuple(
            compare(options, machine, matrices, prompts, context) for machine in machines(options.memory_budget)
        ),
    )
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "sequoia", max_tokens=48)
    add_trees(parser)
    parser.set_defaults(method="eagle")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=Setting.read,
        default=[Setting(0.0), Setting(0.3), Setting(0.6), Setting(1.0), Setting(1.0, 0.9)],
        metavar="TEMPERATURE[/TOP_P]",
        help="(default: 0 0.3 0.6 1 1/0.9)",
    )
    parser.add_argument(
        "--acceptance-prompts",
        type=int,
        default=26,
        help="prompts behind those of --limit that acceptance is measured on (default: %(default)s)",
    )
    parser.add_argument(
        "--grid", nargs="+", type=read_shape, metavar="SIZExDEPTH", help="trees on both machines, for their own grids"
    )
    parser.add_argument(
        "--grid-temperature", type=float, default=0.6, help="at which they are timed (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-budget", type=parse_bytes, default=96 << 20, help="for layers, where they stream (default: 96MiB)"
    )
    parser.add_argument(
        "--calibrate", choices=("quick", "full"), default="quick", help="how to time steps (default: %(default)s)"
    )
    add_read_rate(parser)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/sequoia.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    if Setting(options.grid_temperature) not in options.settings:
        parser.error("--grid-temperature: is none of --settings")
    check_name(options.plot)
    return options


def split(prompts: Sequence[Prompt], limit: int | None, others: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure acceptance on and those to compare on, which come first; half of them without a limit.

    Raises:
        SystemExit: when there are too few.
    """
    count = len(prompts) // 2 if limit is None else limit
    found = list(prompts[count : count + others]), list(prompts[:count])
    if count < 2 or not found[0]:
        raise SystemExit(f"--limit: of {len(prompts)} prompts leave some to measure acceptance on, and compare on two")
    return found


def accepted(engine: Engine, options: argparse.Namespace, prompts: Sequence[Prompt], setting: Setting) -> Floats:
    """[levels, children] how often guesses are accepted at a setting."""
    counts = measure(engine, options, prompts, setting.temperature, setting.top_p)
    return acceptance(Counts(np.sum([one.hits for one in counts], axis=0)))


# ---- a machine ------------------------------------------------------------------------------------------------------


def compare(
    options: argparse.Namespace,
    machine: Machine,
    matrices: Mapping[Setting, Floats],
    prompts: Sequence[Prompt],
    context: int,
) -> OnMachine:
    """Plans a tree for every setting, and times it beside others."""
    with held_reads(options.read_rate):
        found = costs(options, machine)
    planners = {
        setting: Planner(
            found.profile,
            {options.method: matrix},
            context=context,
            size=machine.size,
            depth=DEPTH,
            sampled=setting.temperature > 0,
        )
        for setting, matrix in matrices.items()
    }
    programs = {setting: competitors(machine, setting, planner.best(1).tree) for setting, planner in planners.items()}
    at = Setting(options.grid_temperature)
    best = OptimalTrees(matrices[at], machine.size, DEPTH)
    others = grid(best, options.grid or machine.grid, programs[at][1])
    programs[at] = list(dict.fromkeys([*programs[at], *others]))
    with held_reads(options.read_rate):
        turns = Turns(options, machine, [program for some in programs.values() for program in some], prompts)
    rounds: list[Round] = []
    with progress(f"{machine.name}: answering", len(prompts) * sum(map(len, programs.values()))) as advance:
        for setting, some in programs.items():
            times, planned = turns.take(some, setting, advance), some[1]
            predict = Predictions(options.method, planners[setting], matrices[setting])
            lines = tuple(predict.line(program, setting, times, planned.name) for program in some)
            timed = {other.name: times[other.name] for other in others if setting == at}
            regret = Regret.of(times[planned.name], timed) if timed else None
            widths = tuple(map(len, levels(planned.tree)))
            rounds.append(Round(setting, planned.tree.parents, widths, lines, regret))
    return OnMachine(machine.name, found.profile, found.median_error, found.worst_error, tuple(rounds))


# ---- report ---------------------------------------------------------------------------------------------------------


def show(result: Sequoia) -> None:
    """A table for every setting on each machine, then what the planned trees are and gain."""
    out = report.console()
    for machine in result.machines:
        for round_ in machine.rounds:
            planned = f"{shape(Tree(round_.planned))} planned, levels {_widths(round_)}"
            out.print(table(f"{machine.name}, {round_.setting}: {planned}", COLUMNS, map(_cells, round_.lines)))
    about = f"{result.model}, {result.method}, {result.dataset}, {result.prompts} prompts"
    names = [machine.name for machine in result.machines]
    places = list(zip(result.settings, zip(*(machine.rounds for machine in result.machines), strict=True), strict=True))
    columns = ("setting", *(f"{name}, {what}" for name in names for what in ("tree", "levels", "over off")))
    rows = [(str(setting), *(text for round_ in rounds for text in _summary(round_))) for setting, rounds in places]
    out.print(table(f"{about}: planned trees; predicted, measured (95%)", columns, rows, texts=1))
    rows = [
        (str(setting), name, *(_over(round_, family) for family in SWEPT))
        for setting, rounds in places
        for name, round_ in zip(names, rounds, strict=True)
    ]
    columns = ("setting", "machine", *(f"over {family}" for family in SWEPT))
    out.print(table("speed of the planned tree over the fastest of each kind (95%)", columns, rows, texts=2))
    differ = sum(len({round_.planned for round_ in rounds}) > 1 for _, rounds in places)
    out.print(f"settings at which the machines' trees differ: {differ} of {len(places)}", highlight=False)
    for machine in result.machines:
        out.print(
            f"{machine.name}: the profile is off by {machine.median_error:.1%} (median) and {machine.worst_error:.1%} "
            "(worst) at shapes held out",
            highlight=False,
        )
        for round_ in machine.rounds:
            if round_.regret is not None:
                out.print(f"{machine.name}, {round_.setting}: {_told(round_.regret)}", highlight=False)


def _cells(line: Line) -> tuple[object, ...]:
    tree = Tree(line.parents)
    return (
        line.program,
        len(tree),
        tree.depth,
        "" if line.predicted_tokens is None else f"{line.predicted_tokens:.2f}",
        f"{line.tokens_per_step:.2f}",
        f"{1000 * line.predicted_step:.1f}",
        f"{1000 * line.step:.1f}",
        f"{line.tokens_per_second:.1f}",
        "" if line.predicted_over_off is None else f"{line.predicted_over_off:.2f}",
        f"{line.over_off:.2f}",
        "" if line.family == SEQUOIA else f"{line.sequoia_over_this:.2f}",
    )


def _widths(round_: Round) -> str:
    return "-".join(map(str, round_.widths)) or "none"


def _summary(round_: Round) -> tuple[str, ...]:
    line = round_.best(SEQUOIA)
    assert line is not None
    return shape(Tree(round_.planned)), _widths(round_), f"{line.predicted_over_off:.2f}, {line.over_off:.2f}"


def _over(round_: Round, family: str) -> str:
    line = round_.best(family)
    return "" if line is None else f"{line.sequoia_over_this:.2f}, {line.program}"


def _told(regret: Regret) -> str:
    verdict = "met" if regret.crossed.value <= BAR else "missed"
    return (
        f"regret {regret.crossed:.1%} (bar: {BAR:.0%}, {verdict}), to the luckiest, {regret.fastest}, "
        f"{regret.luckiest:.1%}"
    )


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(result: Sequoia, path: Path) -> None:
    """Speed-ups beside their predictions and tokens per step; below, why the trees differ, and the trees."""
    figure, places = new_figure(3, rows=2, width=4.2)
    _draw_predicted(places[0], result)
    for axes, machine in zip(places[1:3], result.machines, strict=True):
        _draw_tokens(axes, machine)
    _draw_costs(places[3], result)
    for axes, machine in zip(places[4:], result.machines, strict=True):
        round_ = next(round_ for round_ in machine.rounds if round_.regret is not None)
        draw_tree(axes, Tree(round_.planned))
        axes.set_title(f"{machine.name}, {round_.setting}: {shape(Tree(round_.planned))}", loc="left", fontsize=10)
    legend_below(figure, places)
    save(figure, path)


def _draw_predicted(axes: Axes, result: Sequoia) -> None:
    for machine, colour in zip(result.machines, MACHINE_COLOURS, strict=True):
        lines = [line for round_ in machine.rounds for line in round_.lines if line.predicted_over_off is not None]
        predicted = [line.predicted_over_off or 0.0 for line in lines]
        measured = [line.over_off.value for line in lines]
        axes.scatter(predicted, measured, s=12, color=colour, label=machine.name)
    axes.axline((1, 1), slope=1, color="#8a93a6", linewidth=1, zorder=0)
    title(axes, "speed over no guesses, all trees and settings", "predicted", "measured")


def _draw_tokens(axes: Axes, machine: OnMachine) -> None:
    """By temperature, of the fastest of each kind."""
    rounds = sorted((r for r in machine.rounds if r.setting.top_p == 1), key=lambda r: r.setting.temperature)
    for family, colour in COLOURS.items():
        best = [(round_.setting.temperature, round_.best(family)) for round_ in rounds]
        points = [(temperature, line.tokens_per_step.value) for temperature, line in best if line is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, color=colour, label=family)
    axes.set_ylim(bottom=1)
    title(axes, f"{machine.name}, the fastest of each kind", "temperature", "tokens per step")


def _draw_costs(axes: Axes, result: Sequoia) -> None:
    for machine, colour in zip(result.machines, MACHINE_COLOURS, strict=True):
        sizes = np.arange(max(len(line.parents) for round_ in machine.rounds for line in round_.lines) + 1)
        seconds = machine.profile.verify(1 + sizes, 1, 0)
        axes.plot(sizes, seconds / seconds[0], color=colour)
        planned = np.array(sorted({len(round_.planned) for round_ in machine.rounds}))
        axes.scatter(planned, seconds[planned] / seconds[0], s=24, color=colour)
    axes.set_ylim(bottom=0)
    title(axes, "time of a pass, planned sizes marked", "guesses", "over that without guesses")


if __name__ == "__main__":
    main()
