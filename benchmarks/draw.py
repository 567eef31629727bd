"""Draws the README's picture from the demo's numbers: `parlay demo --json benchmarks/results/demo.json` writes them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parlay.bench.demo import NAME

OFF, BET = "#8a93a6", "#2563eb"


def main() -> None:
    options = _options()
    numbers = json.loads(options.json.read_text(encoding="utf-8"))
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "parlay", "font.family": "sans-serif"})
    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
    by_load, by_task = figure.subplots(1, 2)
    _bars(by_load, "by requests at a time", numbers["levels"])
    _bars(by_task, "by kind of task, one request at a time", numbers["categories"])
    by_load.set_ylabel("tokens per second")
    by_load.legend(frameon=False, loc="upper left")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None})


def _bars(axes: Axes, title: str, comparisons: list[dict[str, Any]]) -> None:
    """Two bars per comparison, and what betting gave above them."""
    places = range(len(comparisons))
    axes.bar([p - 0.2 for p in places], [c["off"] for c in comparisons], 0.38, color=OFF, label="plain decoding")
    axes.bar([p + 0.2 for p in places], [c["auto"] for c in comparisons], 0.38, color=BET, label=NAME)
    for place, c in zip(places, comparisons, strict=True):
        axes.annotate(f"{c['auto'] / c['off']:.2f}x", (place, max(c["off"], c["auto"])), (0, 3), ha="center",
                      textcoords="offset points")  # fmt: skip
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xticks(list(places), [c["name"] for c in comparisons])
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo.json"), help="what to draw")
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.svg"), help="SVG (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
