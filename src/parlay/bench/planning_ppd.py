"""`parlay plan --ppd`: what predictive pipelined decoding would take here, by exit layer and number of candidates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parlay.bench import environment
from parlay.bench.report import console, table
from parlay.policy.ppd import Pipeline


@dataclass(frozen=True, slots=True)
class Line:
    """One exit and number of candidates.

    Attributes:
        exit_layer: e.
        source: As `--drafter ppd=SOURCE` takes it.
        trained: Whether it has a trained part.
        candidates: k.
        p_correct: How often the next token is among them.
        reached: Layers that the other unit has done when the target ends.
        milliseconds: Predicted of a token.
        over_plain: Plain decoding with all cores takes so many times as long.
        over_half: The same with the target's half of them.
        compute: Layers per token over those of plain decoding.
        break_even_handoff: Milliseconds of a hand-off at which nothing is gained over the target's half alone; 0 where
            nothing is gained without one.
    """

    exit_layer: int
    source: str
    trained: bool
    candidates: int
    p_correct: float
    reached: float
    milliseconds: float
    over_plain: float
    over_half: float
    compute: float
    break_even_handoff: float


@dataclass(frozen=True, slots=True)
class Planned:
    """All that `parlay plan --ppd` finds; `best` is None where plain decoding with all cores is."""

    model: str
    plain: float  # milliseconds of a token
    plain_half: float
    lines: tuple[Line, ...]
    best: Line | None


def predict(match: Mapping[str, Any], times: Mapping[str, Any]) -> Line:
    """From entries of the file that `parlay measure --ppd` writes.

    A match spares the target the layers that the other unit has done, at the pace of layers before the exit, where the
    target is alone. What lies behind the exit takes longer, as both units read weights there.
    """
    layers, exit_layer, layer = times["layers"], match["exit_layer"], times["layer"]
    timed = [some for some in times["ahead"] if some["candidates"] == match["candidates"]]

    def there(part: str) -> float:  # between the exits that were timed
        return float(np.interp(exit_layer, [some["exit_layer"] for some in timed], [some[part] for some in timed]))

    pipeline = Pipeline(layers, exit_layer, match["candidates"], match["p_correct"], reached=there("reached"))
    after_miss = there("exit") + there("rest") + there("handoff") + times["host"]
    seconds = after_miss - match["p_correct"] * pipeline.saved * layer
    return Line(
        exit_layer, match["source"], match["trained"], match["candidates"], match["p_correct"], pipeline.saved,
        1000 * seconds, times["plain"] / seconds, times["plain_half"] / seconds, pipeline.compute / layers,
        1000 * max(0.0, there("handoff") + times["plain_half"] - seconds),
    )  # fmt: skip


def run(found: Path, json_to: str | None) -> None:
    """Predicts and prints.

    Raises:
        ValueError: for a file that `parlay measure --ppd` did not write.
    """
    captured = environment.capture()
    try:
        written = json.loads(found.read_text(encoding="utf-8"))
        times = written["times"]
        if times is None:
            raise ValueError("ppd: it was measured where there is no second unit; measure on the machine that serves")
        lines = sorted((predict(match, times) for match in written["matches"]), key=lambda line: line.milliseconds)
        result = Planned(
            written["model"], 1000 * times["plain"], 1000 * times["plain_half"], tuple(lines),
            lines[0] if lines[0].over_plain > 1 else None,
        )  # fmt: skip
    except (OSError, KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"ppd: {found} is not what parlay measure --ppd --out writes ({error!r})") from error
    if json_to is not None:
        environment.deliver(json_to, captured, result)
    if json_to != "-":
        show(result)


def show(result: Planned) -> None:
    """Prints the lines, the fastest first, and what to do."""
    columns = (
        "exit layer", "candidates", "p_correct", "layers ahead", "ms/token", "over all cores", "over half of them",
        "compute", "break-even hand-off, ms",
    )  # fmt: skip
    rows = [
        (
            f"{line.exit_layer}{', trained' if line.trained else ''}",
            line.candidates,
            f"{line.p_correct:.3f}",
            f"{line.reached:.1f}",
            f"{line.milliseconds:.2f}",
            f"{line.over_plain:.2f}",
            f"{line.over_half:.2f}",
            f"{line.compute:.2f}",
            f"{line.break_even_handoff:.2f}",
        )
        for line in result.lines
    ]
    title = f"{result.model}: plain {result.plain:.2f} ms a token with all cores, {result.plain_half:.2f} with half"
    out = console()
    out.print(table(title, columns, rows))
    best = result.best
    if best is None:
        out.print("Plain decoding with all cores is faster than any of these.")
    else:
        out.print(f"--speculation ppd:{best.candidates} --drafter ppd={best.source}", highlight=False)
