"""Policies under open-loop load over HTTP: latency by rate of Poisson arrivals, each policy on the same requests.

One server holds all drafters. At every rate and for every seed the policies take turns in another order, each with the
same prompts at the same times, and what drafters remember of answers is dropped between them. Rates are shares of the
server's own capacity without guesses, which is measured first. Two more loads change half-way: one from 0.2 to 1.2
of capacity, one from code and sums to prose. Latency is from a request's due time to the end of its
answer. Intervals draw pairs of seed and request again. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from trial import Conditions, Estimate, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.arrivals import schedule
from parlay.bench.client import Target, Wish
from parlay.bench.figures import check_name, legend_below, look, new_figure, save, title
from parlay.bench.local_server import ServerFailed, local_server
from parlay.bench.report import progress, table
from parlay.bench.serving import Planned, send
from parlay.bench.workloads import Prompt, load_prompts, take_turns

KEY = "benchmark"
OFF = "off"
POLICIES = ("off", "auto", "fixed:1", "fixed:2", "fixed:4", "suffix:8", "synergy", "smartspec")
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
WARM_UP = 4  # requests
SLOW, FAST = 0.2, 1.2  # of capacity, before and after the rate changes
STEADY = 0.4  # of capacity, while the texts change
SHIFTS = (f"{SLOW:g} to {FAST:g}", "code to prose")
CODE = ("coding", "math", "math_reasoning")
PROSE = ("writing", "roleplay", "humanities", "stem")


@dataclass(frozen=True, slots=True)
class Load:
    """Requests and when they are due, with a name."""

    name: str
    prompts: tuple[Prompt, ...]
    times: tuple[float, ...]  # seconds


@dataclass(frozen=True, slots=True)
class Answered:
    """One request: seconds from its due time to its first text and to its end, and what it cost."""

    latency: float
    ttft: float
    tokens: int
    steps: int
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """One policy under one load with one seed."""

    load: str
    seed: int
    policy: str
    requests: tuple[Answered, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One policy under one load, over its seeds."""

    load: str
    policy: str
    latency: float  # mean seconds
    p99: float
    ttft: float  # median
    tokens_per_step: float
    over_off: Estimate | None  # mean latency without guesses over that with them: above 1 is faster
    equal: int  # texts equal to those without guesses


@dataclass(frozen=True, slots=True)
class Serving(Conditions):
    """All results of this benchmark."""

    capacity: float  # requests per second without guesses
    concurrency: int
    requests: int
    seeds: int
    lines: tuple[Line, ...]
    runs: tuple[Run, ...]


class Bench:
    """A running server, and how policies are chosen there.

    Args:
        url: Of the server.
        model: Its name there.
        max_tokens: Of an answer.
        concurrency: Requests in flight at most; the others wait at the client, which counts.
    """

    def __init__(self, url: str, model: str, max_tokens: int, concurrency: int) -> None:
        self._target = Target(url, model, api_key=KEY)
        self._max_tokens, self._concurrency = max_tokens, concurrency

    def run(self, policy: str, prompts: Sequence[Prompt], times: Sequence[float]) -> tuple[Answered, ...]:
        """Answers prompts that are due at these times.

        Raises:
            ServerFailed: when a request fails.
            KeyboardInterrupt: when the user interrupts.
        """
        own_bet = policy.partition(":")[0] not in ("off", "auto", "fixed", "synergy", "smartspec", "goodput")
        self._post("policy", {"policy": OFF if own_bet else policy})
        self._post("forget", {})
        wish = Wish(self._max_tokens, speculation=policy if own_bet else "auto")
        plan = [Planned(prompt, at) for prompt, at in zip(prompts, times, strict=True)]
        traffic = send(self._target, wish, plan, self._concurrency)
        if traffic.unfinished:
            raise KeyboardInterrupt
        found = []
        for outcome in traffic.outcomes:
            reply = outcome.reply
            if reply.failure is not None or reply.usage is None or reply.usage.speculation is None:
                raise ServerFailed(f"a request failed: {reply.failure or 'the server reports no usage.speculation'}")
            first = reply.chunks[0] if reply.chunks else reply.ended
            tokens, steps = reply.usage.completion_tokens or 0, reply.usage.speculation.steps
            found.append(Answered(reply.ended - outcome.due, first - outcome.due, tokens, steps, reply.text))
        return tuple(found)

    def _post(self, what: str, body: dict[str, str]) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{self._target.url}/admin/{what}", json=body, headers=headers, timeout=60, trust_env=False)
        if not answer.is_success:
            raise ServerFailed(answer.text)


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = list(take_turns(load_prompts(options.dataset)))[: options.limit]
    settings = ("--model", options.model, "--no-prefix-caching", "--compile", "wait", "--log-level", "warning")
    with local_server((*settings, "--api-key", KEY)) as url:
        bench = Bench(url, options.model, options.max_tokens, options.concurrency)
        for policy in options.policies:
            bench.run(policy, prompts[:WARM_UP], [0.0] * WARM_UP)
        capacity = measure_capacity(bench, prompts[: 2 * options.requests])
        runs = tuple(run_all(bench, options, prompts, capacity))
    result = Serving(
        **conditions(options, prompts),
        capacity=capacity,
        concurrency=options.concurrency,
        requests=options.requests,
        seeds=options.seeds,
        lines=tuple(summarise(runs)),
        runs=runs,
    )
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "serving", max_tokens=64)
    parser.add_argument(
        "--policies", nargs="+", default=POLICIES, help="names of policies, or bets of requests (default: %(default)s)"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of capacity (default: %(default)s)")
    parser.add_argument("--shifts", action="store_true", help="also the two loads that change half-way")
    parser.add_argument("--requests", type=int, default=24, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/serving.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    if OFF not in options.policies:
        parser.error("--policies: off must be one of them, as the others are compared with it")
    check_name(options.plot)
    return options


def measure_capacity(bench: Bench, prompts: Sequence[Prompt]) -> float:
    """Requests per second without guesses when all are there at once."""
    answers = bench.run(OFF, prompts, [0.0] * len(prompts))
    return len(prompts) / max(answer.latency for answer in answers)


def loads(options: argparse.Namespace, prompts: Sequence[Prompt], capacity: float, seed: int) -> Iterator[Load]:
    """Those of one seed: every rate, and the two that change half-way."""
    count, half = options.requests, options.requests // 2
    for place, share in enumerate(options.shares):
        first = (seed * len(options.shares) + place) * count
        some = tuple(itertools.islice(itertools.cycle(prompts), first, first + count))
        yield Load(f"{share:g}", some, tuple(schedule(share * capacity, count, seed)))
    if options.shifts:
        slow, fast = (schedule(share * capacity, half, seed) for share in (SLOW, FAST))
        later = [slow[-1] + 1 / capacity + time for time in fast]
        some = tuple(itertools.islice(itertools.cycle(prompts), seed * count, seed * count + 2 * half))
        yield Load(SHIFTS[0], some, (*slow, *later))
        code, prose = ([prompt for prompt in prompts if prompt.category in some] for some in (CODE, PROSE))
        halves = (itertools.islice(itertools.cycle(some), seed * half, (seed + 1) * half) for some in (code, prose))
        times = tuple(schedule(STEADY * capacity, 2 * half, seed))
        yield Load(SHIFTS[1], tuple(itertools.chain(*halves)), times)


def run_all(bench: Bench, options: argparse.Namespace, prompts: Sequence[Prompt], capacity: float) -> Iterator[Run]:
    """Every policy under every load with every seed, the policies taking turns."""
    jobs = [(seed, load) for seed in range(options.seeds) for load in loads(options, prompts, capacity, seed)]
    with progress("serving", len(jobs) * len(options.policies)) as advance:
        for number, (seed, load) in enumerate(jobs):
            first = number % len(options.policies)
            for policy in (*options.policies[first:], *options.policies[:first]):
                yield Run(load.name, seed, policy, bench.run(policy, load.prompts, load.times))
                advance()


def summarise(runs: Sequence[Run]) -> Iterator[Line]:
    """Every policy under every load."""
    for load in dict.fromkeys(run.load for run in runs):
        plain = answers(runs, load, OFF)
        for policy in dict.fromkeys(run.policy for run in runs):
            mine = answers(runs, load, policy)
            latency = [answer.latency for answer in mine]
            yield Line(
                load=load,
                policy=policy,
                latency=float(np.mean(latency)),
                p99=float(np.percentile(latency, 99)),
                ttft=float(np.median([answer.ttft for answer in mine])),
                tokens_per_step=sum(a.tokens for a in mine) / max(1, sum(a.steps for a in mine)),
                over_off=None if policy == OFF else Estimate.ratio([a.latency for a in plain], latency),
                equal=sum(a.text == b.text for a, b in zip(plain, mine, strict=True)),
            )


def answers(runs: Sequence[Run], load: str, policy: str) -> list[Answered]:
    """All of a policy under a load, seed by seed."""
    some = sorted((run for run in runs if (run.load, run.policy) == (load, policy)), key=lambda run: run.seed)
    return [answer for run in some for answer in run.requests]


def regret(result: Serving) -> Iterator[tuple[str, float]]:
    """By load, how much longer `auto` took than the best of the others that do not adapt, as a share."""
    for load in dict.fromkeys(line.load for line in result.lines):
        by_policy = {line.policy: line.latency for line in result.lines if line.load == load}
        fixed = [latency for policy, latency in by_policy.items() if policy == OFF or ":" in policy]
        if "auto" in by_policy:
            yield load, by_policy["auto"] / min(fixed) - 1


def show(result: Serving) -> None:
    """Prints the tables."""
    out = report.console()
    out.print(
        f"{result.model}, {result.dataset}: {result.requests} requests a run, {result.seeds} seeds, capacity without "
        f"guesses {result.capacity:.2f} requests/s",
        highlight=False,
    )
    columns = ("load", "policy", "latency s, mean", "p99", "TTFT s, p50", "tokens/step", "over off", "equal")
    rows = (
        (
            line.load,
            line.policy,
            f"{line.latency:.3f}",
            f"{line.p99:.3f}",
            f"{line.ttft:.3f}",
            f"{line.tokens_per_step:.2f}",
            "" if line.over_off is None else f"{line.over_off:.3f}",
            str(line.equal),
        )
        for line in result.lines
    )
    out.print(table("latency by load", columns, rows, texts=2))
    for load, worse in regret(result):
        out.print(f"auto, load {load}: {worse:+.1%} against the best that does not adapt", highlight=False)
    mean = {
        policy: np.mean([line.latency for line in result.lines if line.policy == policy])
        for policy in dict.fromkeys(line.policy for line in result.lines)
    }
    whole = ", ".join(f"{policy} {seconds:.3f}" for policy, seconds in sorted(mean.items(), key=lambda some: some[1]))
    out.print(f"mean latency over the whole sweep: {whole}", highlight=False)


def draw(result: Serving, path: Path) -> None:
    """Mean latency by rate, and its ratio to that without guesses."""
    figure, (latency, ratio) = new_figure(2, width=5.2)
    policies = list(dict.fromkeys(line.policy for line in result.lines))
    styles = look(policies)
    for policy in policies:
        lines = [line for line in result.lines if line.policy == policy and line.load not in SHIFTS]
        shares = [float(line.load) for line in lines]
        latency.plot(shares, [line.latency for line in lines], label=policy, **styles[policy])
        if policy != OFF:
            gains = [line.over_off.value if line.over_off else 1.0 for line in lines]
            ratio.plot(shares, gains, label=policy, **styles[policy])
    ratio.axhline(1.0, color="#8a93a6", linewidth=1)
    latency.set_yscale("log")
    title(latency, f"{result.model}: mean latency", "rate over capacity without guesses", "seconds")
    title(ratio, "against no guesses", "rate over capacity without guesses", "times lower mean latency")
    legend_below(figure, [latency])
    save(figure, path)


if __name__ == "__main__":
    main()
