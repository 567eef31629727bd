"""What the two compute units of predictive pipelined decoding take, measured on steps in which both are at work."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from parlay.bets import Tree
from parlay.drafters.base import Drafters
from parlay.drafters.pipelined import Pipelined
from parlay.engine.compute_unit import Unit, cores
from parlay.engine.engine import Engine
from parlay.engine.model import TargetModel
from parlay.policy.base import Policy
from parlay.policy.fixed import Fixed, Off
from parlay.types import Request, SamplingParams

CONTEXT = 128
STEPS, FIRST = 24, 4  # of each text, of which the first ones do not count
ROUNDS = 5  # so that a slow moment is nobody's alone
SHARES = 0.5, 0.625, 0.75, 0.875, 1.0  # of the layers, where exits are timed; what is between lies between


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step that begins k candidates of the next token after layer e, in seconds.

    Exits are raw ones: what a trained part takes of the other unit's time is not in it.

    Attributes:
        exit_layer: e.
        candidates: k.
        exit: Of the target until the exit layer, from the first layer on.
        rest: From there to the logits, while the other unit is at work.
        handoff: Waiting for the other unit's last layer, and moving what is adopted.
        reached: Layers that the other unit has done by then.
    """

    exit_layer: int
    candidates: int
    exit: float
    rest: float
    handoff: float
    reached: float


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, and layers.

    Attributes:
        layers: D.
        layer: One layer of the target before the exit, with its half of the cores.
        plain: A token with all cores.
        plain_half: A token with the target's half of them, the others idle: what the paper compares with.
        host: Of a step with candidates, all but the model: scheduling, packing, choosing, detokenising.
        ahead: By exits, of which the first and the last ones possible are there, and candidates.
    """

    layers: int
    layer: float
    plain: float
    plain_half: float
    host: float
    ahead: tuple[Ahead, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    exit: float
    rest: float
    handoff: float
    host: float
    begun: int  # layers that a head start brought it
    reached: int


def available(model: TargetModel) -> bool:
    """Whether there is another unit."""
    return model.device.type == "cuda" or len(cores()) > 1


def measure(engine: Engine, candidates: Sequence[int]) -> Times:
    """Times steps of an idle engine without drafters."""
    layers = engine.model.segments.num_layers
    exits = sorted({min(layers - 1, max(-(-layers // 2), round(share * layers))) for share in SHARES})
    unit, plain, half = Unit(engine.model.devices), list[float](), list[float]()
    steps: dict[tuple[int, int], list[_Step]] = {(exit, count): [] for exit in exits for count in candidates}
    for _ in range(ROUNDS):
        plain += [seconds for seconds, _ in _steps(engine, Off())]
        unit.take()
        half += [seconds for seconds, _ in _steps(engine, Off())]
        unit.rest()
        for (exit, count), found in steps.items():
            with beginning(engine, Pipelined(count, exit)) as policy:
                found += [step for _, step in _steps(engine, policy) if step is not None]
    unit.close()
    layer = _per_layer(steps)
    ahead = tuple(
        Ahead(
            exit, count,
            statistics.fmean(step.exit + layer * step.begun for step in found),
            statistics.fmean(step.rest for step in found),
            statistics.fmean(step.handoff for step in found),
            statistics.fmean(step.reached for step in found),
        )
        for (exit, count), found in steps.items()
    )  # fmt: skip
    host = statistics.fmean(step.host for found in steps.values() for step in found)
    return Times(layers, layer, statistics.fmean(plain), statistics.fmean(half), host, ahead)


def _per_layer(steps: dict[tuple[int, int], list[_Step]]) -> float:
    """Seconds of a layer before the exit: how time until the exit grows with layers that were run."""
    by_layers: dict[int, list[float]] = {}
    for (exit, _), found in steps.items():
        for step in found:
            by_layers.setdefault(exit - step.begun, []).append(step.exit)
    ran, seconds = [*by_layers], [statistics.fmean(some) for some in by_layers.values()]
    mean = statistics.fmean(seconds) / max(1.0, statistics.fmean(ran))
    weights = [math.sqrt(len(some)) for some in by_layers.values()]
    slope = float(np.polyfit(ran, seconds, 1, w=weights)[0]) if len(ran) > 1 else mean
    return slope if slope > 0 else mean  # a model so small that its layers take no time


@contextmanager
def beginning(engine: Engine, drafter: Pipelined) -> Iterator[Policy]:
    """Has an idle engine begin next tokens for a while, under the policy that is given."""
    kept, engine.drafters = engine.drafters, Drafters([drafter])
    drafter.attach(engine.model)
    try:
        yield Fixed(drafter.name, Tree.chain(drafter.candidates))
    finally:
        drafter.detach()
        engine.drafters = kept


def _steps(engine: Engine, policy: Policy) -> list[tuple[float, _Step | None]]:
    """Seconds of every step of a made-up text but the first ones, and of its parts where it is pipelined."""
    kept, engine.policy = engine.policy, policy
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    engine.add(Request("timed", tuple(range(CONTEXT)), params))
    found = []
    while engine.has_work:
        tally = engine.model.pipeline.tally if engine.model.pipeline is not None else None
        before = tally.copy() if tally is not None else None
        began = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began
        step = None
        if tally is not None and before is not None and tally.forks > before.forks:
            parts = {part: spent - before.seconds[part] for part, spent in tally.seconds.items()}
            step = _Step(
                **parts,
                host=seconds - sum(parts.values()),
                begun=tally.layers - before.layers,
                reached=tally.reached - before.reached,
            )
        found.append((seconds, step))
    engine.policy = kept
    return found[FIRST:]
