"""`parlay plan`: tables, pictures and exports of what to bet by batch size."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.tree import Tree as Drawing

from parlay.bench import environment, figures
from parlay.bench.report import console, table
from parlay.bets import Tree
from parlay.policy.cost import Profile
from parlay.policy.planner import BatchPlan, Planner, length_table, trtllm_schedule, vllm_bands
from parlay.policy.profiles import read_profile
from parlay.policy.trees import Floats, child_ranks, survival
from parlay.policy.workload import Kind, mixture, read_kinds

DRAWN = 40  # nodes of a tree drawn as text at most


@dataclass(frozen=True, slots=True)
class Line:
    """The best bet at one batch size, as it is saved."""

    batch: int
    method: str | None
    guesses: int
    depth: int
    tokens_per_step: float
    milliseconds: float
    tokens_per_second: float
    speedup: float
    parents: tuple[int, ...]

    @classmethod
    def of(cls, plan: BatchPlan) -> Line:
        return cls(
            plan.batch,
            plan.method,
            len(plan.tree),
            plan.tree.depth,
            plan.tokens_per_step,
            1000 * plan.seconds,
            plan.tokens_per_second,
            plan.speedup,
            plan.tree.parents,
        )


@dataclass(frozen=True, slots=True)
class Plans:
    """All that `parlay plan` finds. `break_even` is the largest batch size at which a bet pays, up to `searched`."""

    profile: str
    acceptance: str
    sampled: bool
    context: int
    break_even: int | None
    searched: int
    lines: tuple[Line, ...]


def run(
    *,
    profile: str,
    acceptance: str,
    method: str | None,
    batches: str,
    context: int,
    size: int,
    depth: int,
    chains: bool,
    sampled: bool,
    export: str | None,
    json_to: str | None,
    plot: Path | None,
) -> None:
    """Plans and prints.

    Raises:
        ValueError: naming the option that is wrong.
    """
    costs, sizes = read_profile(profile), _batch_sizes(batches)
    kinds = read_kinds(acceptance, method or first_drafter(costs))
    matrices = acceptance_of(kinds, costs)
    if sampled and not costs.drawing:
        raise ValueError("sampled: the profile does not say what sampling takes; leave it out, or calibrate anew")
    planner = Planner(
        costs,
        matrices,
        context=context,
        size=size,
        depth=depth,
        chains=chains or export is not None,
        sampled=sampled,
    )
    if export is not None:
        if json_to is not None or plot is not None:
            raise ValueError("export: prints nothing else; leave out json and plot")
        _export(planner, sizes, export)
        return
    if plot is not None:
        figures.check_name(plot)
    captured = environment.capture()
    plans = [planner.best(batch) for batch in sizes]
    most = max(512, *sizes)
    even = planner.break_even(most)
    found = Plans(costs.key, acceptance, sampled, context, even, most, tuple(Line.of(some) for some in plans))
    if json_to is not None:
        environment.deliver(json_to, captured, found)
    if plot is not None:
        figures.draw_plans(plot, found, _labels(plans[0].tree))
    if json_to != "-":
        _print(found, plans, matrices)


def first_drafter(profile: Profile) -> str:
    """Whose guesses are meant where nobody says."""
    if not profile.drafts:
        raise ValueError("method: the profile knows no drafter; name one")
    return next(iter(profile.drafts))


def acceptance_of(kinds: tuple[Kind, ...], profile: Profile) -> dict[str, Floats]:
    """By method, the acceptance of any request.

    Raises:
        ValueError: for a method that the profile has no cost of.
    """
    methods = sorted({name for kind in kinds for name in kind.acceptance})
    for method in methods:
        if method not in profile.drafts:
            raise ValueError(
                f"acceptance: the profile has no costs for {method!r}, only for {', '.join(profile.drafts)}"
            )
    return {method: mixture(kinds, method) for method in methods}


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1 or sizes[-1] > 4096:
        raise ValueError(f"batch {text!r}: write batch sizes from 1 to 4096, as 1,2,4,8")
    return sizes


def _export(planner: Planner, sizes: list[int], form: str) -> None:
    bands = vllm_bands(length_table(planner, range(1, sizes[-1] + 1)), sizes[-1])
    json.dump(bands if form == "vllm" else trtllm_schedule(bands), sys.stdout)
    sys.stdout.write("\n")


def _print(found: Plans, plans: list[BatchPlan], matrices: dict[str, Floats]) -> None:
    columns = ("batch", "bet", "guesses a row", "levels", "tokens/step", "ms/step", "tokens/s", "over no bet")
    rows = [
        (
            line.batch,
            line.method or "none",
            line.guesses,
            line.depth,
            f"{line.tokens_per_step:.2f}",
            f"{line.milliseconds:.2f}",
            f"{line.tokens_per_second:.0f}",
            f"{line.speedup:.2f}x",
        )
        for line in found.lines
    ]
    out = console()
    about = f"{found.context} tokens of context" + (", rows that sample" if found.sampled else "")
    out.print(table(f"{found.profile}, {about}: the best bet by batch size", columns, rows, 2))
    first = plans[0]
    if first.method is not None:
        out.print(draw(first.tree, matrices[first.method], f"batch {first.batch}: {first.method}"))
    if found.break_even is None:
        out.print("no bet pays at any batch size")
    elif found.break_even == found.searched:
        out.print(f"a bet pays at every batch size up to {found.searched}")
    else:
        out.print(f"break-even: a bet pays up to a batch size of {found.break_even}")


def draw(tree: Tree, acceptance: Floats, title: str) -> Drawing:
    """A tree as text: which child each node is, and how likely it is reached."""
    drawing = Drawing(f"{title}, {len(tree)} guesses (child number: how likely it is accepted)")
    ranks, chances = child_ranks(tree).tolist(), survival(tree, acceptance).tolist()
    branches = {-1: drawing}
    shown = sorted(sorted(range(len(tree)), key=lambda node: (-chances[node], node))[:DRAWN])
    for node in shown:
        branches[node] = branches[tree.parents[node]].add(f"{ranks[node] + 1}: {chances[node]:.2f}")
    if len(shown) < len(tree):
        drawing.add(f"and {len(tree) - len(shown)} less likely ones")
    return drawing


def _labels(tree: Tree) -> list[str]:
    return [str(rank + 1) for rank in child_ranks(tree).tolist()]
