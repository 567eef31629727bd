"""What steps cost here: measured once for a machine, a model and its drafters, then kept in the cache folder.

Passes run over rows that never were requests. Their tokens are arbitrary, and their pages, which nobody has at start,
hold whatever lies there; so a row with a long context costs no prompt to be read.
"""

from __future__ import annotations

import logging
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from parlay.engine.calibration_ahead import time_ahead
from parlay.engine.calibration_drafts import time_drafter, time_reading
from parlay.engine.calibration_host import time_host
from parlay.engine.stopwatch import NEW, WIDE, Limits, Shape, Stopwatch
from parlay.policy.cost import (
    DraftCost,
    Profile,
    VerifyCost,
    fit_verify,
    nonnegative_least_squares,
    relative_errors,
)
from parlay.policy.trees import Floats, Ints

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (32, 256, 1024)
KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
PASSES = {"quick": 5, "full": 20}  # of every shape are enough
DRAFTS = {"quick": 3, "full": 9}  # times that every draft is made
HELD_OUT = 5  # of so many shapes one is only predicted
SECONDS = {"quick": 20.0, "full": 60.0}  # about, half of them for passes
HOST_ROWS = 4
SHORTEST = 48  # context that can be measured


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured profile, and how well it predicts shapes that it was not fitted to.

    Attributes:
        profile: What steps cost.
        shapes: How many were measured.
        median_error: Of |predicted / measured - 1| over shapes that were held out.
        worst_error: The largest of them.
        seconds: That measuring took.
    """

    profile: Profile
    shapes: int
    median_error: float
    worst_error: float
    seconds: float


def shapes(limits: Limits, streams: bool) -> list[Shape]:
    """Steps to measure: every size of step beside little context, and some beside more.

    Args:
        limits: What steps can be.
        streams: Whether layers stream, so that trees of one row may be large.
    """
    found = [Shape(rows, CONTEXTS[0], new) for rows in ROWS for new in NEW]
    found += [Shape(1, CONTEXTS[0], new) for new in WIDE if streams]
    found += [Shape(rows, context, new) for context in CONTEXTS[1:] for rows in ROWS for new in (1, 5)]
    return [shape for shape in found if limits.allows(shape)]


# ---- measuring ------------------------------------------------------------------------------------------------------


def calibrate(engine: Engine, how: Literal["quick", "full"], advance: Callable[[float], None]) -> Calibration:
    """Measures what the steps of an engine cost.

    Args:
        engine: Idle, and new: no page of its pool is held.
        how: How thoroughly.
        advance: Told how much is done, from 0 to 1.
    """
    began = time.monotonic()
    config, blocks = engine.config, engine.scheduler.blocks
    limits = Limits(
        config.max_num_seqs, config.max_num_batched_tokens, engine.max_model_len, blocks.num_pages, config.page_size
    )
    watch = Stopwatch(engine, limits)
    streams = engine.model.streamed is not None
    wanted = shapes(limits, streams)
    passes, choices = _time_passes(watch, wanted, how, lambda share: advance(0.5 * share))
    drafts = {}
    guessing = [drafter for drafter in engine.drafters.by_name.values() if not drafter.deterministic]
    for place, drafter in enumerate(guessing):
        if drafter.begins_next:
            drafts[drafter.name] = DraftCost(ahead=time_ahead(watch.long_rows, engine, drafter))
            advance(0.5 + 0.2 * (place + 1) / len(guessing))
            continue
        reading = time_reading(engine, drafter, DRAFTS[how]) if drafter.owns_kv else 0.0
        drafts[drafter.name] = time_drafter(watch, drafter, limits, DRAFTS[how], reading, streams)
        advance(0.5 + 0.2 * (place + 1) / len(guessing))
    drafts |= {name: DraftCost() for name, drafter in engine.drafters.by_name.items() if drafter.deterministic}
    drawn = [drafter.name for drafter in guessing if not drafter.begins_next]
    some, seconds = min(HOST_ROWS, limits.rows), 0.3 * SECONDS[how]
    times = time_host(engine, some, _per_guess(choices), drawn, seconds, lambda share: advance(0.7 + 0.3 * share))
    engine.forget_answers()
    advance(1.0)
    profile, errors = _fitted(passes, engine)
    profile = replace(profile, drafts=drafts, **times._asdict())
    return Calibration(profile, len(passes), *errors, time.monotonic() - began)


Timed = dict[Shape, list[float]]


def _time_passes(
    watch: Stopwatch, wanted: Sequence[Shape], how: Literal["quick", "full"], advance: Callable[[float], None]
) -> tuple[Timed, Timed]:
    """Seconds of passes and of choosing, by shape.

    The shape that has had least time is next, so that all have had as much, and a slow moment is nobody's alone; those
    that take longest are measured once. Their first passes count for nothing: they are the first to touch their pages.
    """
    passes, choices = ({shape: list[float]() for shape in wanted} for _ in range(2))
    chance, began = random.Random(0), time.monotonic()
    spent = dict.fromkeys(wanted, 0.0)
    for shape in wanted:
        if shape.context > CONTEXTS[0] or shape == wanted[0]:
            watch.verify(shape)
    share = 0.0
    while (share < 1.0 and min(map(len, passes.values())) < PASSES[how]) or min(spent.values()) == 0.0:
        shape = min(wanted, key=lambda some: (spent[some], chance.random()))
        seconds, choosing = watch.verify(shape)
        passes[shape].append(seconds)
        choices[shape].append(choosing)
        spent[shape] += seconds + choosing
        share = (time.monotonic() - began) / (0.5 * SECONDS[how])
        advance(min(1.0, share))
    return passes, choices


def _per_guess(choices: Timed) -> float:
    """Seconds of choosing that a further token of a row takes."""
    lines = [(shape.rows, shape.rows * (shape.new - 1), statistics.median(some)) for shape, some in choices.items()]
    rows, guesses, seconds = (np.array(column, dtype=float) for column in zip(*lines, strict=True))
    features = np.stack([np.ones(len(rows)), rows, guesses], axis=1) / seconds[:, None]
    return float(nonnegative_least_squares(features, np.ones(len(rows)))[2])


def _fitted(passes: Timed, engine: Engine) -> tuple[Profile, tuple[float, float]]:
    """A profile of passes, and how far off one of all but a few shapes is at those."""
    measured = {shape: statistics.median(some) for shape, some in passes.items() if some}
    apart = {shape for place, shape in enumerate(measured) if place % HELD_OUT == HELD_OUT // 2}
    rest = {shape: seconds for shape, seconds in measured.items() if shape not in apart}
    knots = knots_near(measured)
    held_out = {shape: measured[shape] for shape in apart or measured}
    errors = relative_errors(_fit(rest or measured, knots), *_columns(held_out))
    profile = Profile(
        hardware=hardware(engine.model.devices),
        model=engine.config.model,
        dtype=str(engine.model.dtype).removeprefix("torch."),
        verify=_fit(measured, knots),
        notes=f"measured by parlay; off by {errors[0]:.1%} (median) and {errors[1]:.1%} (worst) at shapes held out",
    )
    return profile, errors


def knots_near(shapes: Iterable[Shape]) -> list[int]:
    """Those that some pass lies near: at others nothing would tell a step before it from one behind it."""
    sizes = {shape.rows * shape.new for shape in shapes}
    return sorted({min(KNOTS, key=lambda knot: abs(math.log(knot / size))) for size in sizes})


def _fit(measured: Mapping[Shape, float], knots: Sequence[int]) -> VerifyCost:
    new, rows, context, seconds = _columns(measured)
    return fit_verify(new, rows, context, seconds, knots).cost


def _columns(measured: Mapping[Shape, float]) -> tuple[Ints, Ints, Ints, Floats]:
    """[shapes] each: new tokens, rows, tokens in KV, seconds."""
    new, rows, context = np.array([(s.rows * s.new, s.rows, s.rows * (s.context + 1)) for s in measured]).T
    return new, rows, context, np.array([*measured.values()])


def hardware(devices: Sequence[torch.device]) -> str:
    """What steps run on."""
    if devices[0].type == "cuda":
        return " + ".join(torch.cuda.get_device_name(device) for device in devices)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
