"""Sequoia's predicted tokens per step, F(T), against measured ones, for the best trees of several sizes and depths.

Acceptance by level and child is measured on one half of the prompts as `parlay measure` does it, and the trees that are
best for it are then filled on the same half and on the other. Intervals draw prompts again, those of the prediction and
of the measurement together. Three predictions are made of every tree:

- by level and child, which is what is judged;
- by the first level alone, the paper's acceptance vector, as if deeper levels were like it;
- by the acceptance that the same steps showed by level and child. What error is left then comes from paths: an accepted
  second child is not followed as a first child is. The rest of the error comes from where steps begin, since a tree
  that emits more begins its steps at other tokens than the comb that measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

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
from parlay.bench.measuring import Counts
from parlay.bench.report import progress, table
from parlay.bench.workloads import Prompt, by_category, encode, load_prompts
from parlay.bets import Tree
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import Floats, expected_emitted
from parlay.types import SamplingParams

BAR = 0.05


@dataclass(frozen=True, slots=True)
class Half:
    """What a tree emitted on one half of the prompts. Errors are prediction over measurement, less 1."""

    steps: int  # with the whole tree
    other_steps: int
    tokens_per_step: Estimate
    over_all_steps: float
    error: Estimate
    own_acceptance: float  # what these steps' own acceptance predicts
    own_error: float


@dataclass(frozen=True, slots=True)
class Line:
    """One size and depth."""

    size: int
    depth: int
    parents: tuple[int, ...]
    predicted: float
    predicted_by_first_level: float
    same: Half  # the prompts that acceptance was measured on
    other: Half


@dataclass(frozen=True, slots=True)
class Predicted(Conditions):
    """All results of this benchmark."""

    method: str
    temperature: float
    trials: list[int]  # by level of the comb
    acceptance: list[list[float]]  # by level and child; the last row holds for all deeper levels
    lines: tuple[Line, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    halves = halve(load_prompts(options.dataset, options.limit))
    counts = [one.hits for one in measure(comb_engine(options), options, halves[0], options.temperature)]
    hits = np.sum(counts, axis=0)
    matrix = acceptance(Counts(hits))
    best = OptimalTrees(matrix, max(n for n, _ in options.trees), max(d for _, d in options.trees))
    trees = {shape: best.tree(*shape) for shape in options.trees}
    engine = tree_engine(options, list(trees.values()))
    encoded = encode([*halves[0], *halves[1]], engine.tokenizer)
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    lines: list[Line] = []
    with progress("answering", len(trees) * len(encoded)) as advance:
        for shape, tree in trees.items():
            found = watch(
                engine,
                lambda tree=tree: WholeTrees(options.method, tree),
                encoded,
                params,
                options.concurrency,
                advance,
            )
            same, other = found[: len(halves[0])], found[len(halves[0]) :]
            lines.append(
                Line(
                    size=shape[0],
                    depth=shape[1],
                    parents=tree.parents,
                    predicted=expected_emitted(tree, matrix),
                    predicted_by_first_level=expected_emitted(tree, matrix[0]),
                    same=half(tree, counts, same),
                    other=half(tree, counts, other),
                )
            )
    result = Predicted(
        **conditions(options, [*halves[0], *halves[1]]),
        method=options.method,
        temperature=options.temperature,
        trials=hits.sum(axis=1).astype(int).tolist(),
        acceptance=matrix.round(4).tolist(),
        lines=tuple(lines),
    )
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "predicted_tokens", max_tokens=64)
    add_trees(parser)
    parser.add_argument("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    parser.add_argument(
        "--trees",
        nargs="+",
        type=read_shape,
        default=[(4, 2), (8, 3), (8, 6), (16, 4), (16, 8), (32, 6)],
        metavar="SIZExDEPTH",
        help="best trees of which sizes and depths (default: 4x2 8x3 8x6 16x4 16x8 32x6)",
    )
    return parser.parse_args()


def read_shape(text: str) -> tuple[int, int]:
    """Reads the size and depth of a tree."""
    size, given, depth = text.partition("x")
    if not (given and size.isdecimal() and depth.isdecimal() and 0 < int(depth) <= int(size)):
        raise argparse.ArgumentTypeError(f"{text!r}: write SIZExDEPTH, the depth at most the size")
    return int(size), int(depth)


def halve(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Every other prompt of each category; one is left out where their number is odd."""
    ordered = [prompt for some in by_category(prompts).values() for prompt in some]
    if len(ordered) < 2:
        raise SystemExit("limit: two halves need two prompts or more")
    even = len(ordered) - len(ordered) % 2
    return ordered[:even:2], ordered[1:even:2]


def half(tree: Tree, counts: Sequence[Floats], found: Sequence[WholeTrees]) -> Half:
    """Sets prediction against measurement.

    Args:
        tree: What was bet.
        counts: [levels, children + 1] what the comb counted, by prompt.
        found: What the tree gave, by prompt; as many prompts.
    """
    steps = np.array([(one.emitted, one.steps) for one in found], dtype=float)
    shape = counts[0].shape

    def error(sums: Floats) -> float:
        predicted = expected_emitted(tree, acceptance(Counts(sums[2:].reshape(shape))))
        return predicted / float(sums[0] / sums[1]) - 1

    hits, tries = (np.sum([getattr(one, name) for one in found], axis=0) for name in ("hits", "tries"))
    own = expected_emitted(tree, np.divide(hits, tries, out=np.zeros_like(hits), where=tries > 0))
    measured = Estimate.ratio(steps[:, 0].tolist(), steps[:, 1].tolist())
    return Half(
        steps=int(steps[:, 1].sum()),
        other_steps=sum(one.others for one in found),
        tokens_per_step=measured,
        over_all_steps=over_all_steps(found),
        error=Estimate.of(np.hstack([steps, np.array(counts).reshape(len(counts), -1)]), error),
        own_acceptance=own,
        own_error=own / measured.value - 1,
    )


def show(result: Predicted) -> None:
    out = report.console()
    columns = (
        *("guesses", "levels", "F(T)", "same half (95%)", "error (95%)", "other half (95%)", "error (95%)"),
        *("error, own", "error, level 1", "all steps"),
    )
    rows = (
        (
            line.size,
            line.depth,
            f"{line.predicted:.3f}",
            f"{line.same.tokens_per_step:.3f}",
            f"{line.same.error:+.1%}",
            f"{line.other.tokens_per_step:.3f}",
            f"{line.other.error:+.1%}",
            f"{line.same.own_error:+.1%}",
            f"{line.predicted_by_first_level / line.same.tokens_per_step.value - 1:+.1%}",
            f"{line.same.over_all_steps:.3f}",
        )
        for line in result.lines
    )
    name = f"{result.model}, {result.method}, temperature {result.temperature:g}, {result.dataset}, {result.prompts} "
    out.print(table(f"{name}prompts in two halves: tokens per step of whole trees", columns, rows, texts=0))
    for name in ("same", "other"):
        worst = max(abs(getattr(line, name).error.value) for line in result.lines)
        verdict = "met" if worst <= BAR else "missed"
        out.print(f"largest error on the {name} prompts: {worst:.1%} (bar: {BAR:.0%}, {verdict})", highlight=False)


if __name__ == "__main__":
    main()
