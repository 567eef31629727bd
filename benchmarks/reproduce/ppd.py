"""Predictive pipelined decoding (arXiv 2307.05908): latency and compute over exit layer and candidates.

Lines are the formulas of `parlay.policy.ppd`, dots a discrete-event simulation with matches that are independent or
come in runs. How often candidates match has to be measured on a model; here it is an assumption that is drawn for a
range of values, so these are curves of the method, not of a machine.
"""

from __future__ import annotations

import numpy as np
from common import IMAGES, keep

from parlay.bench import environment
from parlay.bench.figures import new_figure, save, title
from parlay.bench.report import console, progress, table
from parlay.policy.ppd import Pipeline, simulate

LAYERS = 40  # of Vicuna-13B, which the paper decodes
EXITS = tuple(range(20, 40, 2))
MATCHES = (0.3, 0.5, 0.7, 0.9)
CANDIDATES = (1, 3, 5)
TOKENS = 20_000
RUNS = 0.6  # autocorrelation of matches that come in runs


def main() -> None:
    captured = environment.capture()
    points = []
    with progress("simulating", len(EXITS) * len(MATCHES)) as advance:
        for p in MATCHES:
            for exit_layer in EXITS:
                pipeline = Pipeline(LAYERS, exit_layer, 3, p)
                for runs in (0.0, RUNS):
                    found = simulate(pipeline, TOKENS, seed=exit_layer, autocorrelation=runs)
                    points.append(
                        {"exit_layer": exit_layer, "p_correct": p, "autocorrelation": runs,
                         "latency": pipeline.token_time / LAYERS, "simulated": found.token_time / LAYERS,
                         "error": found.token_time_error / LAYERS}
                    )  # fmt: skip
                advance()
    compute = [
        {"exit_layer": exit_layer, "candidates": k, "p_correct": 0.7,
         "compute": Pipeline(LAYERS, exit_layer, k, 0.7).compute / LAYERS,
         "busy_units": Pipeline(LAYERS, exit_layer, k, 0.7).busy_units}
        for k in CANDIDATES for exit_layer in EXITS
    ]  # fmt: skip
    breaks = [
        {"exit_layer": e, "p_correct": p, "break_even_handoff": Pipeline(LAYERS, e, 3, p, fork=1.0).break_even_handoff}
        for p in MATCHES for e in EXITS
    ]  # fmt: skip
    keep("ppd", captured, {"layers": LAYERS, "points": points, "compute": compute, "handoff_with_a_fork_of_1": breaks})
    draw(points, compute, breaks)
    show(points)


def draw(points: list[dict], compute: list[dict], breaks: list[dict]) -> None:
    figure, (latency, work, handoff) = new_figure(3, width=4.2)
    for p, colour in zip(MATCHES, ("#9ec5fe", "#5b9bf5", "#2563eb", "#12388f"), strict=True):
        mine = [point for point in points if point["p_correct"] == p]
        alone = [point for point in mine if point["autocorrelation"] == 0]
        latency.plot(EXITS, [point["latency"] for point in alone], color=colour, label=f"p = {p:g}")
        for marker, runs in ((".", 0.0), ("x", RUNS)):
            some = [point for point in mine if point["autocorrelation"] == runs]
            latency.plot(EXITS, [point["simulated"] for point in some], marker, color=colour)
        some = [line["break_even_handoff"] for line in breaks if line["p_correct"] == p]
        handoff.plot(EXITS, some, color=colour, label=f"p = {p:g}")
    for k, style in zip(CANDIDATES, ("-", "--", ":"), strict=True):
        some = [line["compute"] for line in compute if line["candidates"] == k]
        work.plot(EXITS, some, style, color="#a4501a", label=f"k = {k}")
    title(latency, "latency per token over plain decoding", "exit layer of 40", "")
    title(work, "layers computed per token over plain, p = 0.7", "exit layer of 40", "")
    title(handoff, "dearest hand-off that still pays, fork = 1 layer", "exit layer of 40", "layers")
    for axes in (latency, work, handoff):
        axes.set_ylim(bottom=0)
        axes.set_xticks(EXITS[::2])
        axes.legend(frameon=False, fontsize=8)
    save(figure, IMAGES / "reproduce_ppd.svg")


def show(points: list[dict]) -> None:
    alone = [point for point in points if point["autocorrelation"] == 0]
    lines = [(f"{p:g}", *(f"{point['latency']:.3f}" for point in alone if point["p_correct"] == p)) for p in MATCHES]
    out = console()
    out.print(table("latency per token over plain decoding, by exit layer of 40", ("p", *map(str, EXITS)), lines))
    off = np.array([abs(point["simulated"] - point["latency"]) / max(point["error"], 1e-12) for point in points])
    inside = np.mean(off <= 1)
    out.print(
        f"{len(points)} simulated points, half of them with matches that come in runs: {inside:.0%} of them have the "
        f"formula in their 95% interval; the farthest is {off.max():.1f} half-widths away"
    )


if __name__ == "__main__":
    main()
