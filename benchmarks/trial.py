"""What several benchmarks share: what they are run on, engines that bet, and how sure a number is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from parlay.bench import environment
from parlay.bench.measuring import Counting, Counts, comb
from parlay.bench.offline import drive
from parlay.bench.report import Advance, progress
from parlay.bench.workloads import Prompt, encode
from parlay.bets import Auto, Bet, Tree
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.options import parse_drafter
from parlay.policy.base import Policy, PolicyRow
from parlay.policy.fixed import Fixed
from parlay.policy.trees import Floats, child_ranks
from parlay.types import Offer, SamplingParams, StepPlan, StepResult

RESAMPLES = 1000
FEWEST = 5  # prompts from which resampling tells anything

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a benchmark was run on; the documents of several begin with it. Holds no paths of the machine."""

    model: str
    dataset: str
    prompts: int
    max_tokens: int


def conditions(options: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The fields of `Conditions`."""
    dataset = options.dataset.name if options.dataset else "parlay's own prompts"
    return asdict(Conditions(environment.portable(options.model), dataset, len(prompts), options.max_tokens))


def new_parser(description: str | None, results: str, max_tokens: int = 128) -> argparse.ArgumentParser:
    """The options that say what a benchmark is run on, and where `benchmarks/results/RESULTS.json` goes instead."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the target (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of its weights (default: %(default)s)")
    parser.add_argument("--dataset", type=Path, help="prompts, as for parlay bench; by default Parlay's own")
    parser.add_argument("--limit", type=int, help="use this many prompts, the categories taking turns")
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, help="output limit per prompt (default: %(default)s)"
    )
    path = Path(f"benchmarks/results/{results}.json")
    parser.add_argument("--json", type=Path, default=path, help="JSON (default: %(default)s)")
    return parser


def add_drafters(parser: argparse.ArgumentParser) -> None:
    """The option that says where drafters' weights are."""
    parser.add_argument(
        "--drafter", nargs="+", action="extend", default=[], metavar="METHOD=SOURCE", help="as parlay serve takes it"
    )


def new_engine(options: argparse.Namespace, bet: Bet | Auto | None, **settings: Any) -> Engine:
    """An engine that makes this bet with the drafter that the options name for it, and keeps no prompts.

    With `auto` it has all of them, and knows what steps cost.
    """
    sources: Mapping[str, str] = dict(map(parse_drafter, options.drafter))
    own = {name: source for name, source in sources.items() if isinstance(bet, Bet) and name == bet.method}
    if bet == "auto":
        own, settings = sources, {"calibrate": "quick"} | settings
    config = EngineConfig(
        options.model, dtype=options.dtype, speculation=bet, drafters=own, prefix_caching=False, **settings
    )
    return Engine(config)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, timed in seconds."""

    first: float  # until the first tokens
    whole: float
    first_tokens: int  # that came together at first
    tokens: Tokens
    steps: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and what it lies within in 95 of 100 cases; None where there were too few prompts to tell."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, columns: Floats, statistic: Callable[[Floats], float]) -> Estimate:
        """By drawing as many prompts again and again: what is said of one prompt's steps hangs together.

        Args:
            columns: [prompts, quantities] what was counted for each prompt.
            statistic: The number, from the sums of the quantities.
        """
        value = statistic(columns.sum(axis=0))
        if len(columns) < FEWEST:
            return cls(value)
        counts = np.random.default_rng(0).multinomial(len(columns), np.full(len(columns), 1 / len(columns)), RESAMPLES)
        with np.errstate(divide="ignore", invalid="ignore"):
            again = [statistic(sums) for sums in counts @ columns]
        low, high = np.nanpercentile(again, (2.5, 97.5))
        return cls(value, float(low), float(high))

    @classmethod
    def ratio(cls, over: Sequence[float], under: Sequence[float]) -> Estimate:
        """Of two sums over the same prompts."""
        return cls.of(np.array([over, under], dtype=float).T, lambda sums: float(sums[0] / sums[1]))

    @classmethod
    def speedup(cls, own: Floats, base: Floats) -> Estimate:
        """How much faster something is than something else, prompt by prompt: above 1, `own` is faster.

        Args:
            own: [prompts, 2] tokens and the seconds, or steps, that they took.
            base: The same of what it is compared with.
        """
        return cls.of(np.hstack([own, base]), lambda sums: float(sums[0] / sums[1] / (sums[2] / sums[3])))

    def __format__(self, spec: str) -> str:
        within = "" if self.low is None else f" ({self.low:{spec}}..{self.high:{spec}})"
        return f"{self.value:{spec}}{within}"


# ---- tokens per step of a tree --------------------------------------------------------------------------------------

P = TypeVar("P", bound=Policy)


class PerRow(Generic[P]):
    """Lets every row be observed by a policy of its own, all of which plan alike.

    Args:
        make: Makes one.
    """

    def __init__(self, make: Callable[[], P]) -> None:
        self._make, self._plans = make, make()
        self._rows: dict[int, P] = {}

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy`."""
        return self._plans.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy`."""
        for row, got in zip(rows, result.rows, strict=True):
            if row.seq not in self._rows:
                self._rows[row.seq] = self._make()
            self._rows[row.seq].observe([row], StepResult((got,), result.seconds))

    def in_order(self) -> list[P]:
        """The rows' own, in the order in which the requests came."""
        return [self._rows[seq] for seq in sorted(self._rows)]


class WholeTrees:
    """Bets one tree on every row and counts what came of it where all of it was verified.

    Near an output's limit trees are cut, and beside a prompt some drafters guess nothing: such steps say nothing of the
    tree, and which ones they are does not depend on what they would have emitted. A policy hears all that a step
    accepted, so an end-of-sequence token within a step cuts nothing off.

    Attributes:
        steps: With the whole tree.
        emitted: In these.
        others: Other steps that emitted something: those of prompts, and those with less than the tree.
        other_emitted: In these.
        hits: [levels, children] accepted nodes by level and place among their siblings.
        tries: [levels, children] accepted nodes, or roots, that had such a child.
    """

    def __init__(self, method: str, tree: Tree) -> None:
        self._fixed, self._tree = Fixed(method, tree), tree
        self.steps = self.emitted = self.others = self.other_emitted = 0
        width = 1 + max(child_ranks(tree).tolist(), default=0)
        self.hits, self.tries = np.zeros((2, tree.depth, width))

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        """See `Policy`."""
        return self._fixed.plan(rows, offers, budget)

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        """See `Policy`."""
        del rows
        for got in result.rows:
            if len(got.tree) < len(self._tree):
                self.others += bool(got.emitted)
                self.other_emitted += len(got.emitted)
                continue
            self.steps += 1
            self.emitted += len(got.emitted)
            children, ranks = got.tree.children(), child_ranks(got.tree)
            for level, node in enumerate((-1, *got.accepted)):
                self.tries[level : level + 1, : len(children.get(node, ()))] += 1
                if level < len(got.accepted):
                    self.hits[level, ranks[got.accepted[level]]] += 1


def over_all_steps(found: Sequence[WholeTrees]) -> float:
    """Tokens per step with the steps that had no whole tree."""
    steps = sum(one.steps + one.others for one in found)
    return sum(one.emitted + one.other_emitted for one in found) / steps


def watch(
    engine: Engine,
    make: Callable[[], P],
    prompts: Sequence[Tokens],
    params: SamplingParams,
    concurrency: int,
    advance: Advance = lambda: None,
) -> list[P]:
    """Answers prompts under a policy, and returns what was observed of each.

    Raises:
        SystemExit: when the drafter failed.
    """
    policy = PerRow(make)
    engine.policy = policy
    drive(engine, prompts, params, concurrency, advance)
    check_drafters(engine)
    return policy.in_order()


def check_drafters(engine: Engine) -> None:
    """Ends the benchmark where a drafter failed, since its numbers would be those of no drafter."""
    if failed := engine.status().failed_drafters:
        sys.exit(
            f"drafter {failed[0]}: it failed and was switched off, so there is nothing to measure; the log says why"
        )


def tree_engine(options: argparse.Namespace, trees: Sequence[Tree], **settings: Any) -> Engine:
    """An engine whose drafter can fill each of these trees for all rows at once, unless the settings say otherwise.

    Raises:
        SystemExit: for a drafter that fills no tree but where it has seen something.
    """
    whole = covering(trees)
    room = max(512, options.concurrency * (2 + max(map(len, trees))))
    usual = {"max_num_seqs": options.concurrency, "max_num_batched_tokens": room, "seed": 0}
    engine = new_engine(options, Bet(options.method, whole), **usual | settings)
    if engine.drafters.by_name[options.method].deterministic:
        sys.exit(f"method: {options.method} does not fill every tree; name one that samples, as eagle or draft_model")
    return engine


def comb_engine(options: argparse.Namespace) -> Engine:
    """An engine to `measure` with."""
    return tree_engine(options, [comb(options.width, options.depth)])


def measure(
    engine: Engine, options: argparse.Namespace, prompts: Sequence[Prompt], temperature: float, top_p: float = 1.0
) -> list[Counts]:
    """What `parlay measure` counts, by prompt, with a comb of the options' width and depth."""
    tree = comb(options.width, options.depth)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=options.max_tokens)
    with progress("measuring acceptance", len(prompts)) as advance:
        found = watch(
            engine,
            lambda: Counting(options.method, tree, options.width),
            encode(prompts, engine.tokenizer),
            params,
            options.concurrency,
            advance,
        )
    if not any(one.counts.trials[0] for one in found):
        sys.exit("max-tokens: no guess was ever verified; raise it")
    return [one.counts for one in found]


def add_trees(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks that measure trees."""
    parser.add_argument("--method", default="self", help="a drafter that samples (default: %(default)s)")
    add_drafters(parser)
    parser.add_argument("--width", type=int, default=8, help="children of the comb that measures acceptance")
    parser.add_argument("--depth", type=int, default=6, help="and its levels (default: 8 and %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="prompts at a time (default: %(default)s)")


def covering(trees: Iterable[Tree]) -> Tree:
    """The smallest tree that holds all of these, the k-th child of a node in the place of the k-th child."""
    parents: list[int] = []
    places: dict[tuple[int, int], int] = {}  # by parent and place among siblings
    for tree in trees:
        here = {-1: -1}
        for node, (parent, rank) in enumerate(zip(tree.parents, child_ranks(tree).tolist(), strict=True)):
            place = (here[parent], rank)
            if place not in places:
                places[place] = len(parents)
                parents.append(here[parent])
            here[node] = places[place]
    return Tree(tuple(parents))


def acceptance(counts: Counts, least: int = 100) -> Floats:
    """[levels, children] as `parlay.policy.trees` reads it; from the first level that was reached less than `least`
    times on, all levels share one row."""
    rare = np.flatnonzero(counts.trials < least)
    first = max(1, int(rare[0])) if len(rare) else len(counts.hits)
    rows = [*counts.hits[:first], *([counts.hits[first:].sum(axis=0)] if counts.trials[first:].sum() else [])]
    return np.array([row[:-1] / row.sum() for row in rows])
