"""What `parlay train` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parlay.config import Compile
from parlay.train.losses import Divergence

Kind = Literal["eagle", "medusa", "self", "draft_model"]


@dataclass(frozen=True, slots=True)
class Order:
    """What to train, and with how much of everything.

    Attributes:
        kind: The kind of drafter.
        model: The target: a built-in name, a Hugging Face id, a local folder or a .gguf file.
        out: The folder that the drafter is written to; what it takes to go on is kept in `training` below.
        data: The folder of recorded conversations; it can be shared between orders.
        start: A drafter of this kind to go on from, a folder or a Hugging Face id; None to begin anew.
        prompts: Users' turns to answer; none to have the target make them up.
        tokens: To record.
        disk: Bytes that they may take.
        minutes: For everything; for the rest, where it goes on.
        epochs: Times over the data.
        batch: Tokens in a step.
        rate: Highest learning rate.
        turns: How far an `eagle` head goes on from its own output while it learns.
        heads: Of a `medusa` drafter, each for one more guess.
        vocab: Tokens that an `eagle` or `medusa` head can guess.
        intermediate: Width of an `eagle` head's or a `self` drafter's MLP; None takes the target's.
        taps: Layers that a head reads; none for a low, a middle and a high one.
        exit: Layers of the target that a `self` drafter runs; None takes a quarter.
        layers: Layers of a `draft_model`; None takes an eighth of the target's.
        on_policy: The share of steps, from 0 to 1, in which a `draft_model` learns from texts of its own.
        divergence: From the target's distribution.
        int8: Write matrices in int8, else in float16; a `draft_model` in bfloat16, else in float16.
        seed: Decides what is random, but for what recording samples: that also hangs on which rows run together.
        device: What to run on, one device; see `EngineConfig`.
        compile: Whether to compile the target's layers for recording; see `EngineConfig`.
    """

    kind: Kind
    model: str
    out: Path
    data: Path
    start: str | None = None
    prompts: tuple[str, ...] = ()
    tokens: int = 400_000
    disk: int = 8 << 30
    minutes: float = 90.0
    epochs: int = 6
    batch: int = 1024
    rate: float = 2e-3
    turns: int = 4
    heads: int = 4
    vocab: int = 8192
    intermediate: int | None = None
    taps: tuple[int, ...] = ()
    exit: int | None = None
    layers: int | None = None
    on_policy: float = 0.0
    divergence: Divergence = "forward_kl"
    int8: bool = True
    seed: int = 0
    device: str = "auto"
    compile: Compile = "background"
