"""What `benchmarks/sequoia.py` compares: machines and what passes cost there, trees, and how programs take turns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from trial import Estimate, check_drafters, new_engine, tree_engine

from parlay.bench.report import Advance, progress
from parlay.bench.steps import Recorder
from parlay.bench.workloads import Prompt, encode
from parlay.bets import NO_TREE, Tree
from parlay.config import TreeSampling
from parlay.engine.calibration import Calibration, calibrate
from parlay.engine.calibration_drafts import WIDE_TREES
from parlay.engine.stopwatch import TREES
from parlay.policy.fixed import Fixed, Off
from parlay.policy.planner import Planner
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import Floats, chains, expected_emitted
from parlay.types import Request, SamplingParams

OFF, SEQUOIA, CHAIN, CHAINS, SPECINFER, TOPK, GRID = "off", "Sequoia", "chain", "4 chains", "SpecInfer", "top-k", "grid"
# Two rows, so that passes over more tokens are timed than one row may guess where nothing streams.
ENGINE: Mapping[str, Any] = {"compile": "wait", "max_num_seqs": 2, "max_num_batched_tokens": 0, "self_check": False}
WARM_UP = 8  # tokens


@dataclass(frozen=True, slots=True)
class Setting:
    """How requests choose their tokens."""

    temperature: float
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")

    @classmethod
    def read(cls, text: str) -> Self:
        """From the command line: TEMPERATURE or TEMPERATURE/TOP_P."""
        temperature, given, top_p = text.partition("/")
        try:
            found = cls(float(temperature), float(top_p) if given else 1.0)
            found.params(1)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: write TEMPERATURE or TEMPERATURE/TOP_P ({error})") from None
        return found

    def params(self, max_tokens: int) -> SamplingParams:
        """Of a request without a seed."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=max_tokens)


# ---- machines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the layers are, and what is worth comparing when they are there.

    Attributes:
        name: For tables.
        size: Guesses of the largest tree that may be planned.
        chains: Lengths of single chains; the fastest is the one that is compared.
        specinfer: Numbers of chains and their lengths; the same of SpecInfer's.
        grid: Sizes and depths of best trees, among which the planned tree should be the fastest.
        settings: Of its engines.
    """

    name: str
    size: int
    chains: tuple[int, ...]
    specinfer: tuple[tuple[int, int], ...]
    grid: tuple[tuple[int, int], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether layers stream, so that a pass takes long however few tokens it has."""
        return "offload" in self.settings


def machines(memory_budget: int) -> tuple[Machine, Machine]:
    """This one with all layers in memory, and with so many bytes for layers.

    Where layers stream, a pass takes long anyway and larger trees pay, so that larger ones are compared.
    """
    small = ((2, 2), (4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4), (8, 6), (16, 3), (16, 4), (16, 6), (24, 4))
    large = tuple((size, depth) for size in (16, 32, 64, 128) for depth in (4, 6, 9))
    offload = {"offload": "disk", "memory_budget": memory_budget}
    return (
        Machine("in memory", 64, (2, 3, 4), ((2, 2), (2, 3), (3, 4), (5, 8)), small),
        Machine("offloaded", 256, (4, 8), ((3, 4), (4, 6), (5, 8)), large, offload),
    )


def costs(options: argparse.Namespace, machine: Machine) -> Calibration:
    """What steps cost there, measured now by an engine whose drafter fills the trees that calibration times."""
    trees = [*TREES, *(WIDE_TREES if machine.streams else ())]
    engine = tree_engine(options, trees, **{**ENGINE, **machine.settings})
    if machine.streams and engine.model.streamed is None:
        sys.exit("--memory-budget: all layers fit into it, so that none streams; give less")
    with progress(f"{machine.name}: what steps cost", 1) as advance:
        found = calibrate(engine, options.calibrate, lambda _: None)
        advance()
    return found


# ---- programs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Program:
    """A tree that is bet in every step, and how its siblings are drawn; without a tree nothing is bet."""

    name: str
    family: str
    tree: Tree = NO_TREE
    sampling: TreeSampling = "sequoia"

    def is_predicted(self, setting: Setting) -> bool:
        """Whether the acceptance that was measured is that of its guesses: drawn alike, or without chance."""
        return self.sampling == "sequoia" or not setting.temperature


def competitors(machine: Machine, setting: Setting, planned: Tree) -> list[Program]:
    """Plain decoding first, then the planned tree and all that it is compared with."""
    found = [Program(OFF, OFF), Program(f"Sequoia {shape(planned)}", SEQUOIA, planned)]
    if planned and setting.temperature:  # without chance, the likeliest children are everybody's
        found.append(Program(f"top-k {shape(planned)}", TOPK, planned, "topk"))
    found += [Program(f"chain of {length}", CHAIN, Tree.chain(length)) for length in machine.chains]
    found.append(Program("4 chains of 4", CHAINS, chains(4, 4)))
    found += [Program(f"SpecInfer {k}x{d}", SPECINFER, chains(k, d), "specinfer") for k, d in machine.specinfer]
    return found


def grid(best: OptimalTrees, wanted: Sequence[tuple[int, int]], planned: Program) -> list[Program]:
    """The best trees of at most these sizes and depths; the planned tree is itself where it is one of them."""
    trees = {shape(tree): tree for tree in (best.tree(*limits) for limits in wanted)}
    return [
        planned if name == shape(planned.tree) else Program(f"grid {name}", GRID, tree) for name, tree in trees.items()
    ]


def shape(tree: Tree) -> str:
    """Guesses and levels."""
    return f"{len(tree)}x{tree.depth}"


# ---- turns ----------------------------------------------------------------------------------------------------------


class Turns:
    """Lets programs answer the same prompts in turn, one request at a time, by two engines: one has no drafter.

    Args:
        options: The command line's.
        machine: Where the layers are.
        programs: All that will ever answer.
        prompts: What is asked.
    """

    def __init__(
        self, options: argparse.Namespace, machine: Machine, programs: Sequence[Program], prompts: Sequence[Prompt]
    ) -> None:
        settings = {**ENGINE, **machine.settings}
        trees = [program.tree for program in programs]
        self._method, self._tokens = options.method, options.max_tokens
        self._plain = new_engine(options, None, **settings)
        self._engine = tree_engine(options, trees, **settings)
        self._drafter = self._engine.drafters.by_name[options.method]
        self._deepest = max(tree.depth for tree in trees)
        self._prompts = encode(prompts, self._plain.tokenizer)
        for program in (programs[0], max(programs, key=lambda some: len(some.tree))):  # neither engine's first steps
            self._answer(program, self._prompts[0], Setting(0.0), WARM_UP)

    def take(self, programs: Sequence[Program], setting: Setting, advance: Advance) -> dict[str, Floats]:
        """By program, [prompts, 3]: tokens, steps and seconds.

        Raises:
            SystemExit: when the drafter failed, or when there is nothing to tell of a program.
        """
        found = {program.name: np.zeros((len(self._prompts), 3)) for program in programs}
        for number, prompt in enumerate(self._prompts):
            first = number % len(programs)
            for program in (*programs[first:], *programs[:first]):
                found[program.name][number] = self._answer(program, prompt, setting, self._tokens)
                advance()
        check_drafters(self._engine)
        if silent := [name for name, some in found.items() if not some[:, 1].any()]:
            sys.exit(f"--max-tokens: no step of {silent[0]!r} was counted; raise it")
        return found

    def _answer(self, program: Program, prompt: tuple[int, ...], setting: Setting, tokens: int) -> Floats:
        """Tokens, steps and seconds of the steps with whole trees.

        The first step after the prompt's own is left out, since the drafter reads the prompt in it. The output's limit
        lies so far off that it cuts no tree, and the request ends when it has its tokens.
        """
        engine = self._plain if program.family == OFF else self._engine
        policy = Fixed(self._method, program.tree) if program.tree else Off()
        engine.policy = watch = Recorder(policy)
        self._drafter.sampling = program.sampling
        engine.add(Request("measured", prompt, setting.params(tokens + self._deepest + 2)))
        while engine.has_work and sum(step.emitted for step in watch.steps) < tokens:
            engine.step()
        engine.abort("measured")
        steps = [step for step in watch.take(1)[1:] if step.drafted == len(program.tree)]
        return np.array([sum(step.emitted for step in steps), len(steps), sum(step.total for step in steps)])


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def speedup(own: Floats, base: Floats) -> Estimate:
    """Tokens per second over another program's. own, base: [prompts, 3] tokens, steps and seconds."""
    return Estimate.speedup(own[:, ::2], base[:, ::2])


@dataclass(frozen=True, slots=True)
class Line:
    """One program. Predictions of tokens are missing where guesses are drawn otherwise than when they were measured."""

    program: str
    family: str
    parents: tuple[int, ...]
    steps: int
    predicted_tokens: float | None  # per step
    tokens_per_step: Estimate
    predicted_step: float  # seconds
    step: float
    tokens_per_second: float
    predicted_over_off: float | None
    over_off: Estimate
    sequoia_over_this: Estimate


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a planner says of programs, to be set beside what they did.

    Attributes:
        method: The drafter.
        planner: Of the machine and setting.
        acceptance: Of the setting.
    """

    method: str
    planner: Planner
    acceptance: Floats

    def seconds(self, tree: Tree) -> float:
        """A step with this tree."""
        method = self.method if tree else None
        return float(self.planner.seconds(1, np.array(len(tree)), np.array(tree.depth), method))

    def line(self, program: Program, setting: Setting, times: Mapping[str, Floats], sequoia: str) -> Line:
        """Sums up one program beside what was predicted of it.

        Args:
            program: The program.
            setting: How tokens were chosen.
            times: By program, [prompts, 3] tokens, steps and seconds.
            sequoia: The name of the planned tree's.
        """
        own = times[program.name]
        tokens, steps, seconds = map(float, own.sum(axis=0))
        emitted = expected_emitted(program.tree, self.acceptance) if program.is_predicted(setting) else None
        step = self.seconds(program.tree)
        return Line(
            program=program.name,
            family=program.family,
            parents=program.tree.parents,
            steps=round(steps),
            predicted_tokens=emitted,
            tokens_per_step=Estimate.ratio(own[:, 0].tolist(), own[:, 1].tolist()),
            predicted_step=step,
            step=seconds / steps,
            tokens_per_second=tokens / seconds,
            predicted_over_off=None if emitted is None else emitted * self.seconds(NO_TREE) / step,
            over_off=speedup(own, times[OFF]),
            sequoia_over_this=speedup(times[sequoia], own),
        )


@dataclass(frozen=True, slots=True)
class Regret:
    """How much slower the planned tree is than the fastest of a grid; below 0 it is faster than all of them.

    Attributes:
        crossed: The fastest on one half of the prompts is timed on the other half and the other way round, so that luck
            on some prompts does not choose what is timed on them. A half may choose a tree that is not quite the
            fastest, which makes this regret too small where the grid is close.
        luckiest: To the fastest on all prompts, on the same prompts: too large, by that luck.
        fastest: The latter's name.
    """

    crossed: Estimate
    luckiest: Estimate
    fastest: str

    @classmethod
    def of(cls, planned: Floats, others: Mapping[str, Floats]) -> Self:
        """From [prompts, 3] tokens, steps and seconds of the planned tree and of each of the grid."""
        first = np.arange(len(planned)) % 2 == 0
        parts = [
            np.where(half[:, None], one[:, ::2], 0) for one in (planned, *others.values()) for half in (first, ~first)
        ]
        columns = np.hstack(parts)
        fastest = max(others, key=lambda name: float(np.divide(*others[name][:, ::2].sum(axis=0))))
        return cls(Estimate.of(columns, _crossed), Estimate.of(columns, _luckiest), fastest)


def _crossed(sums: Floats) -> float:
    """sums: tokens and seconds by program and half of the prompts; the planned tree comes first."""
    planned, others = _by_half(sums)
    best = (others[..., 0] / others[..., 1]).argmax(axis=0)  # by half
    tokens, seconds = others[best[0], 1] + others[best[1], 0]
    return 1 - float(np.divide(*planned.sum(axis=0)) / (tokens / seconds))


def _luckiest(sums: Floats) -> float:
    planned, others = _by_half(sums)
    tokens, seconds = others.sum(axis=1).T
    return 1 - float(np.divide(*planned.sum(axis=0)) / (tokens / seconds).max())


def _by_half(sums: Floats) -> tuple[Floats, Floats]:
    """[2, 2] and [grid, 2, 2]: halves, then tokens and seconds."""
    found = np.asarray(sums, dtype=np.float64).reshape(-1, 2, 2)
    return found[0], found[1:]
