"""The simulator: replicas behind a router, fed by a workload, driven by the very policies that serve.

It is a discrete-event simulation in which the events are arrivals and ends of steps. Nothing but arrivals, lengths and
outcomes of bets is random, and all of it hangs on the seed, so that policies can be compared on the same requests.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from parlay.policy.base import Policy
from parlay.policy.outcomes import Outcomes
from parlay.policy.replica import Replica
from parlay.policy.server import Counts, Server, Times
from parlay.policy.trees import Floats
from parlay.policy.workload import Kind, Workload
from parlay.types import Offer

Router: TypeAlias = Literal["round_robin", "least_loaded"]
SLICES = 120  # of the time series


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """What happened over time.

    Attributes:
        seconds: [slices] where each slice begins.
        guesses: [slices] mean guesses per row that emitted: the k of published figures; nan where nothing ran.
        rows: [slices] mean rows of a replica that ran.
        tokens_per_second: [slices] emitted by all replicas.
    """

    seconds: Floats
    guesses: Floats
    rows: Floats
    tokens_per_second: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A finished simulation. All times are in simulated seconds but `policy_seconds`.

    Attributes:
        workload: What was asked.
        first: [n] when each request got its first token.
        finish: [n] when it ended.
        counts: Totals over replicas.
        series: What happened over time.
    """

    workload: Workload
    first: Floats
    finish: Floats
    counts: Counts
    series: Series

    @property
    def latency(self) -> Floats:
        """[n] from arrival to the last token."""
        return self.finish - self.workload.arrival

    @property
    def ttft(self) -> Floats:
        """[n] from arrival to the first token."""
        return self.first - self.workload.arrival

    @property
    def tpot(self) -> Floats:
        """Per further token, of requests that have any."""
        more = self.workload.output > 1
        return (self.finish - self.first)[more] / (self.workload.output[more] - 1)

    @property
    def summary(self) -> dict[str, float]:
        """What is printed and saved: latencies in seconds, goodput in tokens per second."""
        found: dict[str, float] = {}
        for name, values in (("latency", self.latency), ("ttft", self.ttft), ("tpot", self.tpot)):
            some = values if len(values) else np.zeros(1)
            found |= {f"{name}_mean": float(some.mean())}
            found |= {f"{name}_p{q}": float(np.percentile(some, q)) for q in (50, 99)}
        counts, span = self.counts, float(self.finish.max()) - float(self.workload.arrival[0])
        return found | {
            "goodput": float(self.workload.output.sum()) / span,
            "tokens_per_step": counts.emitted / max(counts.emitting, 1),
            "guesses": counts.guesses / max(counts.emitting, 1),
            "accepted": counts.accepted / max(counts.guesses, 1),
            "preemptions": counts.preemptions,
            "steps": counts.steps,
            "busy": counts.busy,
            "plans": counts.plans,
            "policy_seconds": counts.policy_seconds,
        }


class _Log:
    """Totals by slice of time, for the series; slices are so wide that arrivals take `SLICES` of them."""

    def __init__(self, seconds: float) -> None:
        self._width = seconds / SLICES
        self._totals: list[list[int]] = []

    def note(self, now: float, guesses: int, emitting: int, emitted: int) -> None:
        place = int(now / self._width)
        while len(self._totals) <= place:
            self._totals.append([0, 0, 0, 0])
        into = self._totals[place]
        into[0] += guesses
        into[1] += emitting
        into[2] += emitted
        into[3] += 1

    @property
    def series(self) -> Series:
        guesses, emitting, emitted, steps = np.array(self._totals, dtype=np.float64).T
        ran = np.where(emitting > 0, emitting, np.nan)
        return Series(
            np.arange(float(len(guesses))) * self._width,
            guesses / ran,
            emitting / np.where(steps > 0, steps, np.nan),
            emitted / self._width,
        )


def simulate(
    server: Server,
    workload: Workload,
    kinds: Sequence[Kind],
    offers: Sequence[Offer],
    make_policy: Callable[[], Policy],
    *,
    replicas: int = 1,
    router: Router = "round_robin",
    seed: int = 0,
    reuse: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Serves a workload until its last request has ended.

    Args:
        server: What each replica is.
        workload: The requests.
        kinds: What kinds of them there are.
        offers: What could be bet on every row.
        make_policy: Makes a replica's policy.
        replicas: How many.
        router: Whom an arriving request is given to: the next in turn, or who has fewest requests, waiting ones too.
        seed: Of the outcomes.
        reuse: See `Replica`.
        progress: Called now and then with the number of requests that have ended since.

    Raises:
        ValueError: when a request could never fit into the KV cache, or there is none.
    """
    check_fits(server, workload)
    times = Times(np.full(len(workload), math.nan), np.full(len(workload), math.nan))
    outcomes = Outcomes(kinds, workload.shown)
    log = _Log(max(float(workload.arrival[-1]), 1.0))
    fleet = [
        Replica(
            server,
            workload,
            outcomes,
            make_policy(),
            offers,
            times,
            np.random.default_rng([seed, place]),
            note=log.note,
            reuse=reuse,
        )
        for place in range(replicas)
    ]
    _run(fleet, workload, router, progress)
    total = Counts()
    for replica in fleet:
        for name in Counts.__slots__:
            setattr(total, name, getattr(total, name) + getattr(replica.counts, name))
    return Run(workload, times.first, times.finish, total, log.series)


def check_fits(server: Server, workload: Workload) -> None:
    """Refuses a workload that could never be served; see `simulate`."""
    if not len(workload):
        raise ValueError("the workload holds no request")
    if (largest := int((workload.prompt + workload.output).max())) > server.kv_tokens:
        raise ValueError(f"kv_tokens: a request of {largest} tokens could never fit into {server.kv_tokens}")


def _run(fleet: Sequence[Replica], workload: Workload, router: Router, progress: Callable[[int], None] | None) -> None:
    """Takes the next event, an arrival or a replica's next step, until there is none."""
    arrivals = workload.arrival.tolist()
    loads, ending = [0] * len(fleet), [0] * len(fleet)  # requests of each replica; those whose last step still runs
    events: list[tuple[float, int]] = []  # when each busy replica is free for its next step
    sent = told = ended = 0
    while events or sent < len(arrivals):
        if sent < len(arrivals) and (not events or arrivals[sent] <= events[0][0]):
            place = loads.index(min(loads)) if router == "least_loaded" else sent % len(fleet)
            if loads[place] == 0:
                heapq.heappush(events, (arrivals[sent], place))
            fleet[place].send(sent)
            loads[place] += 1
            sent += 1
            continue
        now, place = events[0]
        replica = fleet[place]
        loads[place] -= ending[place]
        ended += ending[place]
        ending[place] = 0
        if replica.idle:
            heapq.heappop(events)
            continue
        end, ending[place] = replica.step(now)
        heapq.heapreplace(events, (end, place))
        if progress is not None and ended - told >= 1000:
            progress(ended - told)
            told = ended
    if progress is not None:
        progress(ended - told)
