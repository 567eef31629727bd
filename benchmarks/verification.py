"""Tokens per step of one drafter's trees by how siblings are drawn and verified, over temperatures.

Sequoia draws siblings without replacement, SpecInfer independently (multi-step speculative sampling), and top-k takes
the likeliest ones without chance; all three are lossless. Each fills the same trees on the same prompts: one that is
given by its parents, the best one of a size and depth for the acceptance that is measured first, with Sequoia's
sampling (so this tree is made for Sequoia), and those whose nodes all have equally many children. At temperature 0
there is no chance and the three are one. Counted are steps in which a whole tree was verified; requests have no seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from trial import (
    Conditions,
    Estimate,
    WholeTrees,
    acceptance,
    add_trees,
    comb_engine,
    conditions,
    measure,
    new_parser,
    over_all_steps,
    tree_engine,
    watch,
)

from parlay.bench import environment, report
from parlay.bench.figures import check_name, legend_below, new_figure, save, title
from parlay.bench.measuring import Counts
from parlay.bench.report import progress, table
from parlay.bench.workloads import encode, load_prompts
from parlay.bets import Tree
from parlay.config import TreeSampling
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import Floats, expected_emitted, kary
from parlay.types import SamplingParams

SAMPLINGS: tuple[TreeSampling, ...] = get_args(TreeSampling)
BRANCHED = "[-1,-1,-1,-1,0,0,0,1,4,4,5,8]"  # four, three, two, one below the first nodes
COLOURS = {"sequoia": "#2563eb", "specinfer": "#d97706", "topk": "#0f9d8a"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One tree at one temperature with siblings drawn in one way."""

    tree: str
    parents: tuple[int, ...]
    temperature: float
    sampling: str
    steps: int  # with the whole tree
    other_steps: int
    tokens_per_step: Estimate
    over_all_steps: float
    sequoia_over_this: Estimate | None  # prompt by prompt


@dataclass(frozen=True, slots=True)
class Verification(Conditions):
    """All results of this benchmark."""

    method: str
    measured_at: float  # the temperature of the acceptance that the best tree is made for
    acceptance: list[list[float]]  # by level and child
    cells: tuple[Cell, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = load_prompts(options.dataset, options.limit)
    counts = measure(comb_engine(options), options, prompts, options.measured_at)
    matrix = acceptance(Counts(np.sum([one.hits for one in counts], axis=0)))
    trees = {text: read_tree(text, matrix) for text in options.trees}
    cells = run(options, prompts, trees)
    result = Verification(
        **conditions(options, prompts),
        method=options.method,
        measured_at=options.measured_at,
        acceptance=matrix.round(4).tolist(),
        cells=tuple(cells),
    )
    environment.write_json(options.json, captured, result)
    show(result, matrix)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "verification", max_tokens=64)
    add_trees(parser)
    parser.add_argument(
        "--trees",
        nargs="+",
        default=["16x6", "2^3", "4^2", BRANCHED],
        help="SIZExDEPTH (the best for what is measured), BRANCHES^DEPTH or [parents] (default: %(default)s)",
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.3, 0.6, 1.0])
    parser.add_argument("--measured-at", type=float, default=0.6, help="temperature for the best tree's acceptance")
    parser.add_argument(
        "--plot", type=Path, default=Path("docs/images/verification.svg"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    check_name(options.plot)
    for text in options.trees:
        try:
            read_tree(text, np.array([[0.5]]))
        except ValueError as error:
            parser.error(f"--trees: {text!r}: write SIZExDEPTH, BRANCHES^DEPTH or [parents of a tree] ({error})")
    return options


def read_tree(text: str, matrix: Floats) -> Tree:
    """The tree that is meant; a size and a depth are those of the best one for this acceptance."""
    if text.startswith("["):
        return Tree(tuple(json.loads(text)))
    form = re.fullmatch(r"(\d+)([x^])(\d+)", text)
    if form is None:
        raise ValueError("it is none of these")
    first, last = int(form[1]), int(form[3])
    if not first or not last:
        raise ValueError("it is empty")
    return kary(first, last) if form[2] == "^" else OptimalTrees(matrix, first, last).tree(first, last)


def run(options: argparse.Namespace, prompts: Sequence, trees: dict[str, Tree]) -> list[Cell]:
    """Every tree at every temperature, siblings drawn in all three ways one after the other."""
    engine = tree_engine(options, list(trees.values()))
    drafter = engine.drafters.by_name[options.method]
    encoded = encode(prompts, engine.tokenizer)
    turns: list[tuple[str, float, TreeSampling]] = [
        (text, temperature, sampling)
        for text in trees
        for temperature in options.temperatures
        for sampling in (SAMPLINGS if temperature else SAMPLINGS[:1])
    ]
    cells: list[Cell] = []
    sequoia: list[WholeTrees] = []
    with progress("answering", len(turns) * len(prompts)) as advance:
        for text, temperature, sampling in turns:
            tree = trees[text]
            drafter.sampling = sampling
            params = SamplingParams(temperature=temperature, max_tokens=options.max_tokens)
            found = watch(
                engine,
                lambda tree=tree: WholeTrees(options.method, tree),
                encoded,
                params,
                options.concurrency,
                advance,
            )
            if sampling == "sequoia":
                sequoia = found
            cells.append(cell(text, tree, temperature, sampling, found, sequoia))
    return cells


def cell(
    text: str,
    tree: Tree,
    temperature: float,
    sampling: str,
    found: Sequence[WholeTrees],
    sequoia: Sequence[WholeTrees],
) -> Cell:
    """Sums up what was observed of each prompt, here and with Sequoia's sampling."""
    columns = np.array([(s.emitted, s.steps, f.emitted, f.steps) for s, f in zip(sequoia, found, strict=True)], float)
    return Cell(
        tree=text,
        parents=tree.parents,
        temperature=temperature,
        sampling=sampling if temperature else "any",
        steps=sum(one.steps for one in found),
        other_steps=sum(one.others for one in found),
        tokens_per_step=Estimate.ratio(columns[:, 2].tolist(), columns[:, 3].tolist()),
        over_all_steps=over_all_steps(found),
        sequoia_over_this=Estimate.speedup(columns[:, :2], columns[:, 2:]) if sampling != "sequoia" else None,
    )


def show(result: Verification, matrix: Floats) -> None:
    out = report.console()
    columns = ("tree", "guesses", "temperature", *SAMPLINGS, *(f"sequoia over {name}" for name in SAMPLINGS[1:]))
    by_place = {(cell.tree, cell.temperature, cell.sampling): cell for cell in result.cells}
    lines = []
    for text, temperature in dict.fromkeys((cell.tree, cell.temperature) for cell in result.cells):
        some = [by_place[text, temperature, name if temperature else "any"] for name in SAMPLINGS]
        gains = ("" if one.sequoia_over_this is None else f"{one.sequoia_over_this:.2f}" for one in some[1:])
        steps = (f"{one.tokens_per_step:.2f}" for one in some)
        lines.append((text, len(some[0].parents), f"{temperature:g}", *steps, *gains))
    name = f"{result.model}, {result.method}, {result.dataset}, {result.prompts} prompts: tokens/step (95%)"
    out.print(table(name, columns, lines))
    for text, parents in dict.fromkeys((cell.tree, cell.parents) for cell in result.cells):
        if "x" in text:
            expected = expected_emitted(Tree(parents), matrix)
            out.print(f"{text} is {list(parents)}; {expected:.2f} tokens/step were expected of it", highlight=False)


def draw(result: Verification, path: Path) -> None:
    """A place per tree, a line per way to draw siblings; at temperature 0 they meet."""
    trees = list(dict.fromkeys(cell.tree for cell in result.cells))
    figure, places = new_figure(len(trees), width=3.4)
    for axes, text in zip(places, trees, strict=True):
        for name in SAMPLINGS:
            some = [cell for cell in result.cells if cell.tree == text and cell.sampling in (name, "any")]
            found = [cell.tokens_per_step for cell in some]
            errors = [
                [one.value - (one.value if one.low is None else one.low) for one in found],
                [(one.value if one.high is None else one.high) - one.value for one in found],
            ]
            axes.errorbar(
                [cell.temperature for cell in some],
                [one.value for one in found],
                yerr=errors,
                marker=".",
                capsize=2,
                linewidth=1.2,
                color=COLOURS[name],
                label=name,
            )
        guesses = len(next(cell.parents for cell in result.cells if cell.tree == text))
        label = "given by parents" if text.startswith("[") else text
        title(axes, f"{label}: {guesses} guesses", "temperature", "tokens per step" if axes is places[0] else "")
        axes.set_ylim(bottom=1)
    legend_below(figure, places)
    save(figure, path)


if __name__ == "__main__":
    main()
