"""What a simulated server is, what a policy sees of its rows, and what it notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from parlay.policy.cost import Profile
from parlay.policy.trees import Floats
from parlay.types import Speculation

LEFT, CONTEXT, OUT, GOAL, KIND, BET, REQUEST, READ = range(8)  # what is kept of every row; the last by each drafter


@dataclass(frozen=True, slots=True)
class Server:
    """What a simulated server is.

    Attributes:
        profile: What its steps cost.
        max_num_seqs: Rows that run at a time.
        max_num_batched_tokens: Known tokens in one step.
        kv_tokens: Tokens of all rows that fit into the KV cache.
        noise: Standard deviation of the logarithm of a step's time.
        windows: Tokens that a method's drafter reads of a row of which it has missed more than twice as many.
    """

    profile: Profile
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 400_000
    noise: float = 0.0
    windows: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class SimulatedRow:
    """What a policy sees of a simulated row."""

    seq: int
    start: int
    count: int
    samples: bool
    max_depth: int
    speculation: Speculation = "auto"
    target_tpot: float | None = None
    is_greedy: bool = True  # steps are simulated as those of greedy rows


@dataclass(slots=True)
class Counts:
    """What a replica has done so far."""

    steps: int = 0
    plans: int = 0
    policy_seconds: float = 0.0  # of real time
    preemptions: int = 0
    guesses: int = 0
    accepted: int = 0
    emitted: int = 0
    emitting: int = 0  # rows that emitted something, summed over steps
    busy: float = 0.0  # simulated seconds


@dataclass(slots=True)
class Times:
    """When what happened to every request; nan until it does."""

    first: Floats
    finish: Floats
