"""The simulator against reality: a server's recording replayed under other policies, beside servers that had them.

For every seed each policy gets a server of its own, which answers the same prompts at the same times over HTTP and
records. What was recorded under `auto` is then simulated under all of them, with the costs that this server had
learnt, and compared with what each server itself measured, from a request's arrival to its end. Run it on an otherwise
idle machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from trial import Conditions, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.arrivals import schedule
from parlay.bench.client import Target, Wish
from parlay.bench.figures import check_name, new_figure, save, title
from parlay.bench.local_server import ServerFailed, local_server
from parlay.bench.report import progress, table
from parlay.bench.serving import Planned, send
from parlay.bench.simulating import Settings, compare
from parlay.bench.workloads import Prompt, load_prompts, take_turns

AUTO = "auto"
SIMULATED = {AUTO: "goodput"}  # names of policies there
DRAWS = 4  # simulations of a recording, which draws again which guesses are accepted


@dataclass(frozen=True, slots=True)
class Line:
    """One policy: mean seconds of its requests, over all seeds."""

    policy: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


@dataclass(frozen=True, slots=True)
class Replay(Conditions):
    """All results of this benchmark."""

    rate: float  # requests per second
    requests: int
    seeds: int
    lines: tuple[Line, ...]
    measured: dict[str, tuple[float, ...]]  # by policy: the mean of each seed
    simulated: dict[str, tuple[float, ...]]


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = list(take_turns(load_prompts(options.dataset)))[: options.limit]
    measured: dict[str, list[float]] = {policy: [] for policy in options.policies}
    simulated: dict[str, list[float]] = {policy: [] for policy in options.policies}
    with tempfile.TemporaryDirectory() as folder, progress("servers", options.seeds * len(options.policies)) as advance:
        for seed in range(options.seeds):
            first = seed * options.requests
            some = [prompts[(first + number) % len(prompts)] for number in range(options.requests)]
            times = schedule(options.rate, options.requests, seed)
            files = {policy: Path(folder) / f"{seed}-{number}.jsonl" for number, policy in enumerate(options.policies)}
            for policy, file in files.items():
                record(options, policy, file, some, times)
                measured[policy].append(float(np.mean(list(latencies(file)))))
                advance()
            for policy, mean in simulate(files[AUTO], options.policies):
                simulated[policy].append(mean)
    lines = tuple(
        Line(policy, float(np.mean(measured[policy])), float(np.mean(simulated[policy]))) for policy in options.policies
    )
    result = Replay(
        **conditions(options, prompts),
        rate=options.rate,
        requests=options.requests,
        seeds=options.seeds,
        lines=lines,
        measured={policy: tuple(means) for policy, means in measured.items()},
        simulated={policy: tuple(means) for policy, means in simulated.items()},
    )
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "replay", max_tokens=64)
    usual = ("off", AUTO, "fixed:2", "fixed:4", "smartspec")
    parser.add_argument("--policies", nargs="+", default=usual, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=32, help="of a server (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/replay.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    if AUTO not in options.policies:
        parser.error(f"--policies: {AUTO} must be one of them, as its recording is what is replayed")
    check_name(options.plot)
    return options


def record(
    options: argparse.Namespace, policy: str, file: Path, prompts: Sequence[Prompt], times: Sequence[float]
) -> None:
    """Serves the prompts under one policy and records it."""
    named = () if policy == AUTO else ("--policy", policy)
    settings = ("--model", options.model, "--no-prefix-caching", "--compile", "wait", "--log-level", "warning", *named)
    with local_server((*settings, "--record", str(file))) as url:
        plan = [Planned(prompt, at) for prompt, at in zip(prompts, times, strict=True)]
        traffic = send(Target(url, options.model), Wish(options.max_tokens, speculation="auto"), plan, len(plan))
    if traffic.unfinished:
        raise KeyboardInterrupt
    failures = [outcome.reply.failure for outcome in traffic.outcomes if outcome.reply.failure is not None]
    if failures:
        raise ServerFailed(f"a request failed: {failures[0]}")


def latencies(file: Path) -> Iterator[float]:
    """Seconds from each request's arrival to its end."""
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "arrival" in entry:
            yield entry["finish"] - entry["arrival"]


def simulate(trace: Path, policies: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Mean seconds of the recorded requests under each policy."""
    names = tuple(SIMULATED.get(policy, policy) for policy in policies)
    found = compare(Settings(policies=names, trace=trace, seeds=DRAWS)).outcomes
    for policy, name in zip(policies, names, strict=True):
        yield policy, float(np.mean([some.summary["latency_mean"] for some in found if some.policy == name]))


def show(result: Replay) -> None:
    """Prints the table."""
    out = report.console()
    about = f"{result.requests} requests at {result.rate:g}/s, {result.seeds} seeds"
    rows = (
        (line.policy, f"{line.measured:.3f}", f"{line.simulated:.3f}", f"{line.error:+.1%}") for line in result.lines
    )
    columns = ("policy", "measured s", "simulated s", "error")
    out.print(table(f"{result.model}, {result.dataset}: {about}; mean latency", columns, rows))
    ranks = [
        [line.policy for line in sorted(result.lines, key=lambda line: getattr(line, name))]
        for name in ("measured", "simulated")
    ]
    out.print(f"from fast to slow, measured: {', '.join(ranks[0])}; simulated: {', '.join(ranks[1])}", highlight=False)


def draw(result: Replay, path: Path) -> None:
    """Simulated against measured."""
    figure, (axes,) = new_figure(1, width=5.2)
    for line in result.lines:
        axes.plot(line.measured, line.simulated, "o", label=line.policy)
    both = [value for line in result.lines for value in (line.measured, line.simulated)]
    ends = np.array([0.9 * min(both), 1.1 * max(both)])
    axes.plot(ends, ends, color="#8a93a6", linewidth=1)
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#8a93a6", alpha=0.15, linewidth=0)
    axes.legend(frameon=False)
    title(axes, "mean latency, 10% on either side", "measured, seconds", "simulated, seconds")
    save(figure, path)


if __name__ == "__main__":
    main()
