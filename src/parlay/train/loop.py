"""The training loop: a schedule in steps and time, checkpoints to go on from, evaluation on held-out texts."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from parlay.engine.model import fastest_dtype
from parlay.train.dataset import Batch, Dataset, batches, count_batches
from parlay.train.recording import Recorded

CHECKPOINT = "checkpoint.safetensors"
WARM_UP = 30  # steps
FLOOR = 0.03  # of the learning rate at the end
CLIP = 0.5  # norm of a step's gradient
CHECKPOINT_SECONDS = 120
EVALUATIONS = 8
DEPTH = 4  # guesses of the chains that evaluation counts


class Objective(Protocol):
    """What is trained, and towards what."""

    @property
    def module(self) -> nn.Module:
        """What is trained is among its parameters."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose states it reads, in the order in which it wants them."""
        ...

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss, and the share of first guesses that would be accepted."""
        ...

    def accepted(self, batch: Batch, depth: int) -> tuple[torch.Tensor, int]:
        """[depth] steps whose k-th guess of a chain is accepted, and the number of steps; see `accepted_chains`."""
        ...

    def save(self, folder: Path, int8: bool) -> None:
        """Writes the drafter to a folder, as `--drafter` takes it."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: Times over the data.
        batch: Tokens in a step.
        rate: Highest learning rate.
        seconds: Training ends by then, the rate going down in time; also counted over interruptions.
        seed: Of the order of the data.
    """

    epochs: int
    batch: int
    rate: float
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the drafter was at some step, on held-out texts."""

    step: int
    tokens: int  # that were trained on so far
    seconds: float
    accepted: tuple[float, ...]  # the share of steps in which the k-th guess is accepted

    @property
    def tokens_per_step(self) -> float:
        """Emitted by a step that verifies a chain of `DEPTH`."""
        return 1 + sum(self.accepted)


@dataclass(slots=True)
class _State:
    """Where training stands; all of it is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Training:
    """Trains one objective on one dataset.

    Args:
        objective: What to train.
        data: What on.
        schedule: How long.
        files: Of the dataset, which to train on.
        order: What is trained; another order's checkpoint is not gone on with.
        folder: Where checkpoints are kept.
        show: Told how far it is, from 0 to 1, and how it goes.
        rewrite: What a step learns from in place of its batch; follows from that, the step's number and the weights.
            None for the batch itself.
    """

    def __init__(
        self,
        objective: Objective,
        data: Dataset,
        schedule: Schedule,
        files: Sequence[Path],
        order: Mapping[str, object],
        folder: Path,
        show: Callable[[float, str], None],
        rewrite: Callable[[Batch, int], Batch] | None,
    ) -> None:
        self._objective, self._data, self._schedule, self._show = objective, data, schedule, show
        self._rewrite = rewrite
        self._checkpoint = folder / CHECKPOINT
        self._files = list(files)
        self._order_of = json.loads(json.dumps(dict(order)))
        parameters = [weight for weight in objective.module.parameters() if weight.requires_grad]
        self._device = parameters[0].device
        self._optimizer = torch.optim.AdamW(
            parameters, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._state = _State()
        self.evaluations: list[Evaluation] = []

    def run(self) -> list[Evaluation]:
        """Trains from where the last checkpoint is to the end, and returns all evaluations."""
        self._resume()
        files = self._files
        sizes = [count_batches(self._read(file), self._schedule.batch) for file in files]
        steps = sum(sizes) * self._schedule.epochs
        done, number = self._state, 0
        loss_seen, first_seen = math.nan, math.nan
        if not self.evaluations:
            self._evaluate()
        began = time.monotonic() - done.seconds
        last_saved, is_over = time.monotonic(), False
        for file in self._order(files):
            size = sizes[files.index(file)]
            if is_over or number + size <= done.step:
                number += size
                continue
            chance = random.Random(f"{self._schedule.seed} {number}")
            for batch in batches(self._read(file), self._schedule.batch, chance):
                number += 1
                if number <= done.step:
                    continue
                done.seconds = time.monotonic() - began
                progress = max(done.step / steps, done.seconds / self._schedule.seconds)
                if is_over := progress >= 1:
                    break
                batch = batch.to(self._device)
                batch = self._rewrite(batch, number) if self._rewrite else batch
                loss, first = self._step(batch, progress)
                done.step, done.tokens = number, done.tokens + batch.count
                loss_seen = loss if math.isnan(loss_seen) else 0.95 * loss_seen + 0.05 * loss
                first_seen = first if math.isnan(first_seen) else 0.95 * first_seen + 0.05 * first
                rate = done.tokens / max(1e-9, done.seconds)
                self._show(progress, f"loss {loss_seen:.3f}, first guess {first_seen:.1%}, {rate:.0f} tokens/s")
                if progress * EVALUATIONS > len(self.evaluations):
                    self._evaluate()
                if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                    self._save()
                    last_saved = time.monotonic()
        done.seconds = time.monotonic() - began
        if self.evaluations[-1].step != done.step:
            self._evaluate()
        self._save()
        return self.evaluations

    def _read(self, file: Path) -> list[Recorded]:
        return self._data.read(file, self._objective.taps)

    def _order(self, files: Sequence[Path]) -> list[Path]:
        found: list[Path] = []
        for epoch in range(self._schedule.epochs):
            order = list(files)
            random.Random(f"{self._schedule.seed} {epoch}").shuffle(order)
            found += order
        return found

    def _step(self, batch: Batch, progress: float) -> tuple[float, float]:
        rate = max(FLOOR, 0.5 * (1 + math.cos(math.pi * progress))) * min(1.0, (self._state.step + 1) / WARM_UP)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate * rate
        # Products may be rounded where that is faster; weights, sums and softmaxes stay in float32.
        half = fastest_dtype(self._device) is torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            loss, first = self._objective.loss(batch, progress)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._objective.module.parameters(), CLIP)
        self._optimizer.step()
        return loss.item(), first

    def _evaluate(self) -> None:
        """Counts what would be accepted of the held-out greedy answers."""
        accepted, chains = torch.zeros(DEPTH), 0
        for batch in batches(self._read(self._data.held_out), self._schedule.batch, None):
            some, count = self._objective.accepted(batch.to(self._device), DEPTH)
            accepted += some
            chains += count
        shares = tuple((accepted / max(1, chains)).tolist())
        state = self._state
        self.evaluations.append(Evaluation(state.step, state.tokens, state.seconds, shares))

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self._objective.module.named_parameters() if weight.requires_grad}

    def _save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in self._named().items():
            tensors[f"weight {name}"] = weight.detach()
            for key, value in self._optimizer.state[weight].items():
                tensors[f"{key} {name}"] = value
        about = {
            "state": asdict(self._state),
            "evaluations": [asdict(one) for one in self.evaluations],
            "files": [file.name for file in self._files],
            "order": self._order_of,
        }
        partial = self._checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata={"about": json.dumps(about)})
        partial.rename(self._checkpoint)

    def _resume(self) -> None:
        about = read_about(self._checkpoint.parent)
        if about is None:
            return
        if changed := sorted(name for name, value in self._order_of.items() if about["order"].get(name) != value):
            raise ValueError(
                f"out: {self._checkpoint.parent.parent} holds what was trained with another {', '.join(changed)}; name "
                "another folder"
            )
        tensors = load_file(self._checkpoint)
        self._state = _State(**about["state"])
        self.evaluations = [Evaluation(**(one | {"accepted": tuple(one["accepted"])})) for one in about["evaluations"]]
        with torch.no_grad():
            for name, weight in self._named().items():
                weight.copy_(tensors[f"weight {name}"])
                if f"step {name}" in tensors:  # not before the first step
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    self._optimizer.state[weight] = {key: tensors[f"{key} {name}"].to(weight.device) for key in keys}


def read_about(folder: Path) -> dict[str, Any] | None:
    """Where a training stands that was broken off; None where there is none."""
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        return None
    with safe_open(checkpoint, "pt") as file:
        return dict(json.loads(file.metadata()["about"]))
