"""Policies under open-loop load over HTTP: latency by rate of Poisson arrivals, each policy on the same requests.

One server holds all drafters. At every rate and for every seed the policies take turns in another order, each with the
same prompts at the same times, and what drafters remember of answers is dropped between them. Rates are shares of the
server's own capacity without guesses, which is measured first. Latency is from a request's due time to the end of its
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
    """One policy at one rate with one seed."""

    share: float
    rate: float
    seed: int
    policy: str
    requests: tuple[Answered, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One policy at one rate, over its seeds."""

    share: float
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


def run_all(bench: Bench, options: argparse.Namespace, prompts: Sequence[Prompt], capacity: float) -> Iterator[Run]:
    """Every policy at every rate with every seed, the policies taking turns."""
    supply = itertools.cycle(prompts)
    jobs = list(itertools.product(range(options.seeds), options.shares))
    with progress("serving", len(jobs) * len(options.policies)) as advance:
        for number, (seed, share) in enumerate(jobs):
            some = list(itertools.islice(supply, options.requests))
            rate, first = share * capacity, number % len(options.policies)
            times = schedule(rate, options.requests, seed)
            for policy in (*options.policies[first:], *options.policies[:first]):
                yield Run(share, rate, seed, policy, bench.run(policy, some, times))
                advance()


def summarise(runs: Sequence[Run]) -> Iterator[Line]:
    """Every policy at every rate."""
    for share in dict.fromkeys(run.share for run in runs):
        plain = answers(runs, share, OFF)
        for policy in dict.fromkeys(run.policy for run in runs):
            mine = answers(runs, share, policy)
            latency = [answer.latency for answer in mine]
            yield Line(
                share=share,
                policy=policy,
                latency=float(np.mean(latency)),
                p99=float(np.percentile(latency, 99)),
                ttft=float(np.median([answer.ttft for answer in mine])),
                tokens_per_step=sum(a.tokens for a in mine) / max(1, sum(a.steps for a in mine)),
                over_off=None if policy == OFF else Estimate.ratio([a.latency for a in plain], latency),
                equal=sum(a.text == b.text for a, b in zip(plain, mine, strict=True)),
            )


def answers(runs: Sequence[Run], share: float, policy: str) -> list[Answered]:
    """All of a policy at a rate, seed by seed."""
    some = sorted((run for run in runs if (run.share, run.policy) == (share, policy)), key=lambda run: run.seed)
    return [answer for run in some for answer in run.requests]


def regret(result: Serving) -> Iterator[tuple[float, float]]:
    """By rate, how much longer `auto` took than the best of the others that do not adapt, as a share."""
    for share in dict.fromkeys(line.share for line in result.lines):
        by_policy = {line.policy: line.latency for line in result.lines if line.share == share}
        fixed = [latency for policy, latency in by_policy.items() if policy == OFF or ":" in policy]
        if "auto" in by_policy:
            yield share, by_policy["auto"] / min(fixed) - 1


def show(result: Serving) -> None:
    """Prints the tables."""
    out = report.console()
    out.print(
        f"{result.model}, {result.dataset}: {result.requests} requests a run, {result.seeds} seeds, capacity without "
        f"guesses {result.capacity:.2f} requests/s",
        highlight=False,
    )
    columns = ("of capacity", "policy", "latency s, mean", "p99", "TTFT s, p50", "tokens/step", "over off", "equal")
    rows = (
        (
            f"{line.share:g}",
            line.policy,
            f"{line.latency:.3f}",
            f"{line.p99:.3f}",
            f"{line.ttft:.3f}",
            f"{line.tokens_per_step:.2f}",
            "" if line.over_off is None else f"{line.over_off:.3f}",
            f"{line.equal} of {result.requests * result.seeds}",
        )
        for line in result.lines
    )
    out.print(table("latency by load", columns, rows, texts=2))
    for share, worse in regret(result):
        out.print(f"auto at {share:g} of capacity: {worse:+.1%} against the best that does not adapt", highlight=False)
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
        lines = [line for line in result.lines if line.policy == policy]
        shares = [line.share for line in lines]
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
