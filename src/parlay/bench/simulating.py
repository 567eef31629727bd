"""`parlay simulate`: policies compared on the same simulated loads."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from parlay.bench import environment, figures
from parlay.bench.planning import acceptance_of, first_drafter
from parlay.bench.report import Spread, console, progress, table
from parlay.policy.acceptance import MethodAcceptance, Reliability
from parlay.policy.base import Policy
from parlay.policy.cost import Profile
from parlay.policy.goodput import Goodput
from parlay.policy.named import Situation, make, offered
from parlay.policy.profiles import read_profile
from parlay.policy.recording import Recorded, is_recording, read_recording
from parlay.policy.server import Server
from parlay.policy.simulate import Router, check_fits, simulate
from parlay.policy.trees import Ints
from parlay.policy.workload import Kind, Phase, Workload, draw, read_kinds, read_trace

PROFILE, ACCEPTANCE = "h100-llama-8b", "0.7"
LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "kv_tokens": 400_000}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to simulate; see the options of the command for each."""

    policies: tuple[str, ...]
    profile: str | None = None
    acceptance: str | None = None
    method: str | None = None
    size: int = 16
    depth: int = 8
    rates: str | None = None
    phases: str | None = None
    trace: Path | None = None
    lengths: str = "256,256"
    cv: float = 1.0
    requests: int = 1000
    seeds: int = 3
    replicas: int = 1
    router: Router = "least_loaded"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    noise: float = 0.0
    reuse: int = 4


@dataclass(frozen=True, slots=True)
class Load:
    """One of the loads: phases to draw arrivals from, or None for those of the trace."""

    name: str
    rate: float | None
    phases: tuple[Phase, ...] | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy under one load with one seed."""

    load: str
    rate: float | None
    policy: str
    seed: int
    requests: int
    summary: dict[str, float]
    seconds: tuple[float, ...]  # of the time series
    guesses: tuple[float | None, ...]
    rows: tuple[float | None, ...]
    tokens_per_second: tuple[float, ...]
    calibration: dict[str, list[Mapping[str, float]]]  # by method: predicted acceptance against what happened
    calibration_error: float | None  # mean distance of the two; None for policies that predict nothing
    simulated_in: float  # seconds of real time


@dataclass(frozen=True, slots=True)
class Outcomes:
    """All results of a simulation."""

    settings: Settings
    outcomes: tuple[Outcome, ...]


def run(settings: Settings, json_to: str | None, plot: Path | None) -> None:
    """Simulates and prints.

    Raises:
        ValueError: naming the option that is wrong.
    """
    if plot is not None:
        figures.check_name(plot)
    captured = environment.capture()
    found = compare(settings)
    if json_to is not None:
        environment.deliver(json_to, captured, found)
    if plot is not None:
        figures.draw_simulation(plot, found.outcomes)
    if json_to != "-":
        show(found.outcomes, settings)


def compare(settings: Settings, loads: Sequence[Load] = ()) -> Outcomes:
    """All policies under all loads with all seeds, as many at a time as there are cores.

    Args:
        settings: What to simulate.
        loads: Under which loads, where not under those that the settings name.
    """
    loads = loads or _loads(settings)
    _check(settings, loads)
    jobs = list(itertools.product(range(len(loads)), range(settings.seeds), settings.policies))
    found: dict[tuple[int, int, str], Outcome] = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    with progress("simulating", len(jobs)) as advance:
        if workers == 1:
            for load, seed, policy in jobs:
                found[load, seed, policy] = one(settings, loads[load], seed, policy)
                advance()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                waiting = {pool.submit(one, settings, loads[job[0]], job[1], job[2]): job for job in jobs}
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    advance()
    return Outcomes(settings, tuple(found[job] for job in jobs))


def one(settings: Settings, load: Load, seed: int, policy: str) -> Outcome:
    """One policy under one load."""
    began = time.perf_counter()
    server, situation = _situation(settings, load, seed)
    make_policy, policies = make(policy, situation), []

    def made() -> Policy:
        policies.append(make_policy())
        return policies[-1]

    result = simulate(
        server,
        situation.workload,
        situation.kinds,
        situation.offers,
        made,
        replicas=settings.replicas,
        router=settings.router,
        seed=seed,
        reuse=situation.reuse,
    )
    series, calibration = result.series, _calibration(policies[0])
    errors = [some.error for some in calibration.values()]
    return Outcome(
        load.name,
        load.rate,
        policy,
        seed,
        len(result.workload),
        result.summary,
        tuple(series.seconds.tolist()),
        _optional(series.guesses),
        _optional(series.rows),
        tuple(series.tokens_per_second.tolist()),
        {method: some.curve for method, some in calibration.items()},
        statistics.mean(errors) if errors else None,
        time.perf_counter() - began,
    )


def _calibration(policy: Policy) -> dict[str, Reliability]:
    """How far a policy that predicts acceptance could be trusted, by method."""
    found = {}
    for method, drafter in policy.drafters.items() if isinstance(policy, Goodput) else ():
        if isinstance(drafter.acceptance, MethodAcceptance):
            found[method] = drafter.acceptance.reliability
    return found


def _optional(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else value for value in values.tolist())


def _situation(settings: Settings, load: Load, seed: int) -> tuple[Server, Situation]:
    recorded = _recorded(settings.trace)
    profile = _profile(settings, recorded)
    limits = {
        name: getattr(settings, name) or (usual if recorded is None else recorded.about[name])
        for name, usual in LIMITS.items()
    }
    windows = {} if recorded is None else recorded.about["windows"]
    server = Server(profile, **limits, noise=settings.noise, windows=windows)
    if recorded is not None and settings.acceptance is None:
        kinds, work = recorded.kinds, recorded.workload
    else:
        kinds = read_kinds(settings.acceptance or ACCEPTANCE, settings.method or first_drafter(profile))
        work = _workload(settings, load, kinds, seed)
        acceptance_of(kinds, profile)  # refuses methods that have no costs
    offers = offered(kinds, settings.size, settings.depth)
    reuse = 1 if work.shown else settings.reuse  # what is offered differs from token to token
    return server, Situation(profile, kinds, work, offers, reuse)


def _profile(settings: Settings, recorded: Recorded | None) -> Profile:
    if settings.profile is not None or recorded is None:
        return read_profile(settings.profile or PROFILE)
    if recorded.profile is None:
        raise ValueError("profile: the server that was recorded knew none; name one with --profile")
    return recorded.profile


@lru_cache(maxsize=1)
def _recorded(trace: Path | None) -> Recorded | None:
    """The recording that a trace is, if it is one."""
    return read_recording(trace) if trace is not None and is_recording(trace) else None


def _workload(settings: Settings, load: Load, kinds: tuple[Kind, ...], seed: int) -> Workload:
    if load.phases is not None and load.rate is None:
        return draw(load.phases, _lengths(settings.lengths), kinds, seed, settings.cv)
    if load.phases is not None:
        return _first(settings, load.phases[0], kinds, seed)
    assert settings.trace is not None
    recorded = _recorded(settings.trace)
    if recorded is not None:
        arrival, prompt, output = recorded.workload.arrival, recorded.workload.prompt, recorded.workload.output
    else:
        arrival, (prompt, output) = read_trace(settings.trace)
    rng, shares = np.random.default_rng(seed), np.array([kind.share for kind in kinds])
    return Workload(arrival, prompt, output, rng.choice(len(kinds), size=len(arrival), p=shares / shares.sum()))


def _first(settings: Settings, phase: Phase, kinds: tuple[Kind, ...], seed: int) -> Workload:
    """The first so many requests of a steady load."""
    while True:
        work = draw([phase], _lengths(settings.lengths), kinds, seed, settings.cv)
        if len(work) >= settings.requests:
            some = slice(settings.requests)
            return Workload(work.arrival[some], work.prompt[some], work.output[some], work.kind[some])
        phase = Phase(2 * phase.seconds, phase.rate)


def _check(settings: Settings, loads: Sequence[Load]) -> None:
    """Finds out what is wrong with the options before anything runs."""
    for load in loads:
        server, situation = _situation(settings, load, 0)
        check_fits(server, situation.workload)
        for policy in settings.policies:
            make(policy, situation)
    if len(set(settings.policies)) < len(settings.policies):
        raise ValueError("policies: each may be named once")


def _loads(settings: Settings) -> list[Load]:
    given = [name for name in ("rates", "phases", "trace") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise ValueError("rate, phases, trace: give one of them")
    if settings.trace is not None:
        return [Load(settings.trace.name, None, None)]
    if settings.phases is not None:
        return [Load(settings.phases, None, tuple(_phases(settings.phases, settings.replicas)))]
    return [
        Load(f"{rate:g}/s", rate, (Phase(settings.requests / (rate * settings.replicas), rate * settings.replicas),))
        for rate in _rates(settings.rates or "2")
    ]


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(1e-6 <= rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"rate {text!r}: write requests per second, as 2 or 0.5,1,2,4, each once")
    return rates


def _phases(text: str, replicas: int) -> Iterator[Phase]:
    for part in text.split(","):
        seconds, _, rate = part.partition("x")
        try:
            phase = Phase(float(seconds), float(rate) * replicas)
        except ValueError:
            phase = Phase(0.0, 0.0)
        if not (0 < phase.seconds < float("inf") and 0 <= phase.rate < float("inf")):
            raise ValueError(f"phases {text!r}: write seconds and requests per second, as 40x1,40x16")
        yield phase


def _lengths(text: str) -> tuple[Ints, Ints]:
    prompt, _, output = text.partition(",")
    if prompt.strip().isdecimal() and output.strip().isdecimal() and int(prompt) and int(output):
        return np.array([int(prompt)]), np.array([int(output)])
    if not Path(text).exists():
        raise ValueError(f"lengths {text!r}: write tokens of prompt and output, as 256,128, or name a CSV file")
    return read_trace(Path(text))[1]


# ---- report ---------------------------------------------------------------------------------------------------------


def show(outcomes: Sequence[Outcome], settings: Settings) -> None:
    """Prints a table for every load."""
    out = console()
    for load in dict.fromkeys(outcome.load for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.load == load]
        measured = _recorded(settings.trace)
        lines = [*_lines(some), *([] if measured is None else [_measured(measured)])]
        out.print(table(_title(load, some, settings), COLUMNS, lines))
        for outcome in some:
            if outcome.calibration_error is not None and outcome.seed == 0:
                points = 100 * outcome.calibration_error
                out.print(f"{outcome.policy}: predicted acceptance was off by {points:.1f} points on average")


COLUMNS = (
    "policy", "latency s, mean", "p99", "TTFT s, p50", "TPOT ms, p50", "tokens/s", "guesses/row", "tokens/step",
    "over off", "over best fixed", "plan ms",
)  # fmt: skip


def _title(load: str, some: Sequence[Outcome], settings: Settings) -> str:
    where = f" over {settings.replicas} replicas" if settings.replicas > 1 else ""
    profile = settings.profile or (PROFILE if _recorded(settings.trace) is None else "as recorded")
    return f"{profile}, {load}{where}: {some[0].requests} requests, {settings.seeds} seeds; means over seeds"


def _measured(recorded: Recorded) -> tuple[object, ...]:
    """What the server itself took, under the policy that it had."""
    latency, work = recorded.latency, recorded.workload
    per_token = (latency - recorded.ttft) / np.maximum(work.output - 1, 1)
    span = float((work.arrival + latency).max() - work.arrival.min())
    return (
        f"measured ({recorded.about['policy']})",
        f"{latency.mean():.3f}",
        f"{np.percentile(latency, 99):.3f}",
        f"{np.median(recorded.ttft):.3f}",
        f"{1000 * np.median(per_token):.2f}",
        f"{work.output.sum() / span:.0f}",
        *("",) * 5,
    )


def _lines(some: Sequence[Outcome]) -> Iterator[tuple[object, ...]]:
    by_policy = {
        policy: [o.summary for o in some if o.policy == policy] for policy in dict.fromkeys(o.policy for o in some)
    }
    fixed = [policy for policy in by_policy if policy == "off" or policy.startswith("fixed")]
    for policy, found in by_policy.items():

        def mean(name: str, found: Iterable[dict[str, float]] = found) -> float:
            return statistics.mean(summary[name] for summary in found)

        yield (
            policy,
            f"{mean('latency_mean'):.3f}",
            f"{mean('latency_p99'):.3f}",
            f"{mean('ttft_p50'):.3f}",
            f"{1000 * mean('tpot_p50'):.2f}",
            f"{mean('goodput'):.0f}",
            f"{mean('guesses'):.2f}",
            f"{mean('tokens_per_step'):.2f}",
            f"{gain(found, by_policy['off']):.2f}" if "off" in by_policy else "",
            f"{gain(found, min((by_policy[name] for name in fixed), key=total)):.3f}" if fixed else "",
            f"{1000 * mean('policy_seconds') / max(mean('plans'), 1):.2f}",
        )


def total(found: Sequence[dict[str, float]]) -> float:
    """Mean latency, summed over seeds."""
    return sum(summary["latency_mean"] for summary in found)


def gain(found: Sequence[dict[str, float]], than: Sequence[dict[str, float]]) -> Spread:
    """How many times lower the mean latency is than the other's, seed by seed."""
    return Spread.of(b["latency_mean"] / a["latency_mean"] for a, b in zip(found, than, strict=True))
