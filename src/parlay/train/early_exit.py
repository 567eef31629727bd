"""Training of an early exit: a small part behind the target's first layers, in front of its own norm and vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from parlay.drafters.early_exit import default_exit
from parlay.drafters.exit_part import ExitPart, ExitShape, load_exit, read_shape, save_exit
from parlay.engine.checkpoint import fetch_folder
from parlay.engine.model import LoadedModel
from parlay.engine.segments import SegmentedModel
from parlay.train.chains import accepted_chains
from parlay.train.dataset import Batch
from parlay.train.losses import Divergence, Targets, logits_loss
from parlay.train.order import Order
from parlay.train.recording import Recorded


class ExitObjective:
    """What the part behind an exit learns: to guess from the state after a layer what the target says in the end.

    No position looks at another, so that a text's places are learned like any others. The norm and the vocabulary stay
    the target's own: a copy to train would be most of the drafter's memory, and read beside the target's.

    Args:
        part: The weights.
        target: Whose norm and vocabulary follow; it can only be used by this object afterwards.
        model: The target's name.
        divergence: From the target's distribution.
    """

    def __init__(self, part: ExitPart, target: LoadedModel, model: str, divergence: Divergence) -> None:
        self.module = part
        self.taps = (part.shape.exit,)
        self._model = model
        self._divergence: Divergence = divergence
        target.model.requires_grad_(False)
        self._target = SegmentedModel(target.model, target.layers, target.returns_tuple)

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss to go down, and how often a first guess would be accepted at temperature 1."""
        del progress
        learn = batch.probs[..., 0] > 0
        targets = Targets(batch.ids[learn], batch.probs[learn], torch.ones(batch.count) / batch.count)
        total, agreement = logits_loss(self._logits(batch.hidden[learn]), targets, self._divergence)
        return total, float(agreement.mean())

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, 1, hidden] after the exit's layer -> [N, vocab]."""
        blank = torch.zeros(len(hidden), dtype=torch.long)
        none, reads = range(self._target.num_layers, self._target.num_layers), torch.arange(len(hidden))
        return self._target(blank, blank, layers=none, hidden=hidden[:, 0], reads=reads, then=self.module).logits

    @torch.no_grad()
    def accepted(self, batch: Batch, depth: int) -> tuple[torch.Tensor, int]:
        """See `accepted_chains`. While a chain is right the exit reads the states that were recorded."""
        guesses = torch.stack([self._logits(line).argmax(-1) for line in batch.hidden])
        return accepted_chains([guesses] * depth, batch)

    def save(self, folder: Path, int8: bool) -> None:
        """Writes the part."""
        save_exit(self.module, folder, self._model, int8)


def taps(order: Order, layers: int) -> tuple[int, ...]:
    """The layer, of so many, that is left after."""
    if order.start:
        shape = read_shape(fetch_folder(order.start))
        if shape.layers != layers:
            raise ValueError(f"start: {order.start} is of a model of {shape.layers} layers, and this one has {layers}")
        return (shape.exit,)
    exit = default_exit(layers) if order.exit is None else order.exit
    if not 0 < exit < layers:
        raise ValueError(f"exit: must be from 1 to {layers - 1} layers, not {exit}")
    return (exit,)


def begin(order: Order, target: LoadedModel, texts: Iterable[Recorded]) -> ExitObjective:
    """A part to train, and how; it begins by changing nothing."""
    del texts
    layers = len(target.shapes)
    hidden = int(target.model.get_input_embeddings().weight.shape[1])
    inner = order.intermediate or int(getattr(target.config, "intermediate_size", None) or 4 * hidden)
    (exit,) = taps(order, layers)
    if order.start:
        part = load_exit(fetch_folder(order.start), target).to(target.device)
    else:
        part = ExitPart(ExitShape(exit, layers, hidden, inner))
    return ExitObjective(part, target, order.model, order.divergence)
