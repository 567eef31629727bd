"""`parlay measure`: how often a drafter's guesses are accepted, by level and child, as `parlay plan` reads it.

Sequoia's way (arXiv 2402.12374, section 4): every node of a comb has a few children, and it is counted which of them
was accepted, if any. The comb's spine are first children, so level k is measured where k first children were right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from parlay.bench import environment
from parlay.bench.offline import drive
from parlay.bench.report import console, progress, table
from parlay.bench.workloads import by_category, encode, load_prompts
from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.policy.base import PolicyRow
from parlay.policy.fixed import Fixed
from parlay.policy.trees import Floats, child_ranks
from parlay.types import Offer, SamplingParams, StepPlan, StepResult

SURE = 0.95  # of the confidence intervals


@dataclass(slots=True)
class Counts:
    """Which children were accepted: [levels, children + 1], in the last column none of them."""

    hits: Floats

    @classmethod
    def none(cls, depth: int, width: int) -> Counts:
        return cls(np.zeros((depth, width + 1)))

    @property
    def trials(self) -> Floats:
        """[levels] accepted nodes whose children were verified."""
        return self.hits.sum(axis=1)

    @property
    def acceptance(self) -> Floats:
        """[levels, children] of the levels that were reached."""
        reached = self.trials > 0
        return self.hits[reached, :-1] / self.trials[reached, None]

    def interval(self, level: int, child: int) -> tuple[float, float]:
        """What the acceptance lies within, by Wilson's score."""
        count, z = self.trials[level], NormalDist().inv_cdf(0.5 + SURE / 2)
        share = self.hits[level, child] / count
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        return max(0.0, float(middle - half)), min(1.0, float(middle + half))


class Counting:
    """Bets one comb on every row and counts what becomes of it.

    Args:
        method: The drafter.
        tree: The comb.
    """

    def __init__(self, method: str, tree: Tree, width: int) -> None:
        self._fixed = Fixed(method, tree)
        self._width = width
        self.counts = Counts.none(tree.depth, width)

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy`."""
        return self._fixed.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """Counts nodes that had all their children."""
        del rows
        for got in result.rows:
            children, ranks = got.tree.children(), child_ranks(got.tree)
            for level, node in enumerate((-1, *got.accepted)):
                if len(children.get(node, ())) == self._width:
                    rank = ranks[got.accepted[level]] if level < len(got.accepted) else self._width
                    self.counts.hits[level, rank] += 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of request, as `parlay plan` reads it, and how it was measured."""

    name: str
    share: float
    acceptance: dict[str, list[list[float]]]
    trials: list[int]
    intervals: list[list[tuple[float, float]]]

    @classmethod
    def of(cls, name: str, method: str, counts: Counts, share: float) -> Measured:
        acceptance = counts.acceptance
        levels, width = acceptance.shape
        intervals = [[counts.interval(level, child) for child in range(width)] for level in range(levels)]
        trials = [int(count) for count in counts.trials[:levels]]
        return cls(name, share, {method: acceptance.round(4).tolist()}, trials, intervals)


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that `parlay measure` finds. `temperature` is None where a live server was asked."""

    method: str
    temperature: float | None
    kinds: tuple[Measured, ...]


def comb(width: int, depth: int) -> Tree:
    """First children are a chain, and every node of it has `width` children."""
    parents: list[int] = []
    spine = -1
    for _ in range(depth):
        first = len(parents)
        parents += [spine] * width
        spine = first
    return Tree(tuple(parents))


def run(
    config: EngineConfig,
    *,
    dataset: Path | None,
    limit: int | None,
    temperature: float,
    width: int,
    depth: int,
    max_tokens: int,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measures on the prompts of a dataset, by category.

    Raises:
        ValueError: naming the option that is wrong.
    """
    bet = config.speculation
    if not isinstance(bet, Bet):
        raise ValueError("speculation: name the drafter to measure, as --speculation eagle")
    captured = environment.capture()
    tree = comb(width, depth)
    engine = Engine(replace(config, speculation=replace(bet, tree=tree, free=False), prefix_caching=False))
    groups = by_category(load_prompts(dataset, limit))
    kinds: list[Measured] = []
    total = Counts.none(depth, width)
    with progress("measuring", sum(map(len, groups.values()))) as advance:
        for name, prompts in groups.items():
            policy = Counting(bet.method, tree, width)
            engine.policy = policy
            params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
            drive(engine, encode(prompts, engine.tokenizer), params, concurrency, advance)
            total.hits += policy.counts.hits
            if policy.counts.trials[0]:
                kinds.append(Measured.of(name, bet.method, policy.counts, share=len(prompts)))
    if not kinds:
        raise ValueError("max-tokens: no guess was ever verified; raise it")
    deliver(Measurement(bet.method, temperature, tuple(kinds)), total, captured, out, as_json)


def scrape(url: str, method: str | None, api_key: str | None, out: Path | None, as_json: bool) -> None:
    """Reads from a live server how often the first guesses were accepted, by level.

    Raises:
        ValueError: when the server has verified no draft of the method.
        OSError: when it cannot be reached.
    """
    captured = environment.capture()
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(url.rstrip("/") + "/metrics", headers=headers, timeout=10)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise OSError(f"{url} has no metrics: {error}") from error
    drafts: dict[str, float] = {}
    accepted: dict[str, dict[int, float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            name = sample.labels.get("method", "")
            if sample.name == "parlay:spec_decode_num_drafts_total":
                drafts[name] = sample.value
            elif sample.name == "parlay:spec_decode_num_accepted_tokens_per_pos_total":
                accepted.setdefault(name, {})[int(sample.labels["position"])] = sample.value
    found = method or next(iter(drafts), None)
    if found is None or not drafts.get(found):
        raise ValueError(f"{url} has verified no draft{f' of {method}' if method else ''} yet")
    reached = [drafts[found], *(accepted.get(found, {}).get(level, 0.0) for level in range(64))]
    depth = max(1, sum(count > 0 for count in reached[1:]))
    counts = Counts(np.array([[after, before - after] for before, after in pairwise(reached)][:depth]))
    measurement = Measurement(found, None, (Measured.of("live", found, counts, 1.0),))
    deliver(measurement, counts, captured, out, as_json)


def deliver(
    found: Measurement, total: Counts, captured: environment.Environment, out: Path | None, as_json: bool
) -> None:
    """Writes the file and prints the tables."""
    if out is not None:
        environment.write_json(out, captured, found)
    if as_json:
        environment.deliver("-", captured, found)
        return
    levels, width = total.acceptance.shape
    columns = ("level", "nodes", *(f"child {child + 1}" for child in range(width)), "any")
    rows: list[Sequence[Any]] = []
    for level in range(levels):
        shares = [
            f"{share:.3f} ({low:.3f}-{high:.3f})"
            for share, (low, high) in zip(
                total.acceptance[level], (total.interval(level, child) for child in range(width)), strict=True
            )
        ]
        rows.append((level + 1, int(total.trials[level]), *shares, f"{total.acceptance[level].sum():.3f}"))
    out_console = console()
    out_console.print(table(f"{found.method}: acceptance by level and child, {SURE:.0%} sure", columns, rows))
    lines = [
        (kind.name, kind.trials[0], *(f"{share:.3f}" for share in kind.acceptance[found.method][0]))
        for kind in found.kinds
    ]
    names = ("kind", "nodes", *(f"child {child + 1}" for child in range(width)))
    out_console.print(table("level 1 by kind of request", names, lines))
    if out is not None:
        out_console.print(f"parlay plan --acceptance {out}", highlight=False)
