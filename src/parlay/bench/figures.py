"""Pictures of plans and simulations. matplotlib is an extra, and imported only where a picture is asked for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parlay.bets import Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from parlay.bench.planning import Plans
    from parlay.bench.simulating import Outcome

COLOURS = {
    "off": "#8a93a6",
    "synergy": "#0f9d8a",
    "smartspec": "#8b5cf6",
    "goodput": "#2563eb",
    "auto": "#2563eb",
    "suffix": "#db2777",
    "prompt_lookup": "#4d7c0f",
    "oracle": "#111827",
}
FIXED = "YlOrBr"  # the longer, the darker
DRAWN = 128  # nodes of a tree at most


def new_figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with so many places, in one look.

    Raises:
        ValueError: when matplotlib is not there.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: needs matplotlib; install parlay with its extra: pip install 'parlay[plot]'") from None
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "parlay", "font.family": "sans-serif"})
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places


def check_name(path: Path) -> None:
    """Refuses what `save` could not write, before anything is computed."""
    new_figure(1)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"plot {str(path)!r}: the name must end in .svg, .png or .pdf")


def save(figure: Figure, path: Path) -> None:
    """Writes the picture in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def title(axes: Axes, text: str, x: str, y: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def legend_below(figure: Figure, places: Sequence[Axes]) -> None:
    """One legend for several places, where it covers nothing."""
    labelled = [place.get_legend_handles_labels() for place in places]
    handles = {name: handle for some in labelled for handle, name in zip(*some, strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def look(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each policy's line is drawn."""
    from matplotlib import colormaps

    fixed = [policy for policy in policies if policy.startswith("fixed")]
    found: dict[str, dict[str, Any]] = {}
    for policy in policies:
        if policy in fixed:
            shade = 0.4 + 0.55 * (fixed.index(policy) + 0.5) / len(fixed)
            found[policy] = {"color": colormaps[FIXED](shade), "linestyle": "--"}
        else:
            color = COLOURS.get(policy.partition(":")[0], "#444444")
            found[policy] = {"color": color, "linestyle": ":" if policy == "oracle" else "-"}
    return found


# ---- plans ----------------------------------------------------------------------------------------------------------


def draw_plans(path: Path, found: Plans, labels: Sequence[str]) -> None:
    """Speed-up and guesses by batch size, and the tree of the first one."""
    figure, (speed, guesses, picture) = new_figure(3, width=3.8)
    batches = [line.batch for line in found.lines]
    speed.plot(batches, [line.speedup for line in found.lines], "o-", color=COLOURS["goodput"])
    speed.axhline(1, color=COLOURS["off"], linewidth=1)
    title(speed, "tokens per second over no bet", "batch size", "times")
    guesses.plot(batches, [line.guesses for line in found.lines], "o-", color=COLOURS["goodput"], label="guesses a row")
    guesses.plot(batches, [line.depth for line in found.lines], "s--", color=COLOURS["synergy"], label="levels")
    guesses.legend(frameon=False)
    title(guesses, "the best bet", "batch size", "")
    for axes in (speed, guesses):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_ylim(bottom=0)
    draw_tree(picture, Tree(found.lines[0].parents), labels)
    picture.set_title(f"batch {batches[0]}: {len(labels)} guesses", loc="left", fontsize=10)
    save(figure, path)


def draw_tree(axes: Axes, tree: Tree, labels: Sequence[str] = ()) -> None:
    """A tree from its root down; siblings from left to right as they are drawn."""
    axes.axis("off")
    tree = tree.trim(DRAWN, tree.depth)
    across = _leaves_side_by_side(tree)
    for node, parent in enumerate(tree.parents):
        top = tree.depths[parent] if parent >= 0 else 0
        axes.plot([across[parent], across[node]], [-top, -tree.depths[node]], color="#c3c9d5", linewidth=1, zorder=1)
    axes.scatter([across[-1]], [0], s=40, color=COLOURS["oracle"], zorder=2)
    nodes = range(len(tree))
    axes.scatter([across[n] for n in nodes], [-tree.depths[n] for n in nodes], s=24, color=COLOURS["goodput"], zorder=2)
    if len(tree) <= 24:
        for node, label in zip(nodes, labels, strict=False):
            axes.annotate(label, (across[node], -tree.depths[node]), (4, 2), textcoords="offset points", fontsize=7)


def _leaves_side_by_side(tree: Tree) -> dict[int, float]:
    """Where every node is from left to right: leaves one step apart, others over the middle of their children."""
    children, across, free = tree.children(), {}, 0

    def place(node: int) -> float:
        nonlocal free
        below = [place(child) for child in children.get(node, [])]
        if not below:
            below, free = [float(free)], free + 1
        across[node] = (below[0] + below[-1]) / 2
        return across[node]

    place(-1)
    return across


# ---- simulations ----------------------------------------------------------------------------------------------------


def draw_simulation(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Latency against rate, one line per policy, or latency as bars where there is one load; guesses over time."""
    figure, (latency, over_time) = new_figure(2, width=5.2)
    draw_latency(latency, outcomes)
    loads = list(dict.fromkeys(outcome.load for outcome in outcomes))
    draw_guesses(over_time, [outcome for outcome in outcomes if outcome.load == loads[-1]])
    legend_below(figure, [latency, over_time])
    save(figure, path)


def draw_latency(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Mean latency of requests, the mean over seeds."""
    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    rates = sorted({outcome.rate for outcome in outcomes if outcome.rate is not None})
    styles = look(policies)

    def mean(policy: str, rate: float | None) -> float:
        return statistics.mean(o.summary["latency_mean"] for o in outcomes if (o.policy, o.rate) == (policy, rate))

    if len(rates) > 1:
        for policy in policies:
            axes.plot(rates, [mean(policy, rate) for rate in rates], label=policy, marker=".", **styles[policy])
        axes.set_xscale("log")
        if max(o.summary["latency_mean"] for o in outcomes) > 10 * min(o.summary["latency_mean"] for o in outcomes):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        title(axes, "mean latency of a request", "requests per second and replica", "seconds")
    else:
        rate = rates[0] if rates else None
        values = [mean(policy, rate) for policy in policies]
        axes.barh(policies[::-1], values[::-1], color=[styles[policy]["color"] for policy in policies[::-1]])
        for place, value in enumerate(values[::-1]):
            axes.annotate(f"{value:.2f}", (value, place), (3, 0), va="center", textcoords="offset points", fontsize=8)
        title(axes, f"mean latency of a request, {outcomes[0].load}", "seconds", "")


def draw_guesses(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Guesses per row over time, of the first seed."""
    first = min(outcome.seed for outcome in outcomes)
    some = [outcome for outcome in outcomes if outcome.seed == first]
    styles = look([outcome.policy for outcome in some])
    for outcome in some:
        if outcome.policy != "off":
            values = [float("nan") if value is None else value for value in outcome.guesses]
            axes.plot(outcome.seconds, values, label=outcome.policy, linewidth=1.2, **styles[outcome.policy])
    axes.set_ylim(bottom=0)
    title(axes, f"guesses per row over time, {some[0].load}", "seconds", "")
