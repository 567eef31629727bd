"""Training of an EAGLE head."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from parlay.drafters.eagle_files import load_head, read_taps, save_head
from parlay.drafters.eagle_head import EagleHead
from parlay.engine.model import LoadedModel
from parlay.train.chains import accepted_chains
from parlay.train.dataset import Batch
from parlay.train.eagle_start import new_head
from parlay.train.losses import Divergence, ReducedVocabulary, Targets, head_loss
from parlay.train.order import Order
from parlay.train.recording import Recorded
from parlay.train.unrolled import turns

DECAY = 0.9  # what a guess counts, compared with the one before it
ALONE = 0.35  # of a training, at its beginning, the first turn is learned alone, which is several times as fast


class EagleObjective:
    """What an EAGLE head learns, and how good it is.

    Args:
        head: The weights.
        embedding: [vocab, hidden] the target's, frozen.
        turns: How far the head goes on from its own output while it learns.
        divergence: From the target's distribution.
        alone: The share of the training in which only the first turn is learned; a head that has learned the others
            would forget them.
    """

    def __init__(
        self, head: EagleHead, embedding: torch.Tensor, turns: int, divergence: Divergence, alone: float = ALONE
    ) -> None:
        self.module, self._embedding = head, embedding
        self.taps = head.shape.taps
        self._turns, self._alone = turns, alone
        self._divergence: Divergence = divergence
        self._vocabulary = ReducedVocabulary(head.ids, len(embedding))

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss to go down, and how often a first guess would be accepted at temperature 1.

        Args:
            batch: Texts.
            progress: From 0 to 1.
        """
        places, probs, known = self._vocabulary.of(batch.ids, batch.probs)
        total, first = batch.hidden.new_zeros(()), 0.0
        count = self._turns if progress >= self._alone else 1
        for turn, out in enumerate(self._run(batch, count)):
            learn = known.clone()
            learn[:, :turn] = False
            targets = Targets(places[learn], probs[learn], torch.ones(int(learn.sum())) / batch.count)
            hidden = self.module.norm(out[learn])
            loss, agreement = head_loss(hidden, self.module.lm_head.weight, targets, self._divergence)
            total = total + DECAY**turn * loss
            first = first if turn else float(agreement.mean())
        return total, first

    def _run(self, batch: Batch, count: int) -> list[torch.Tensor]:
        return turns(self.module, self._embedding[batch.tokens], batch.hidden.flatten(2), count)

    def save(self, folder: Path, int8: bool) -> None:
        """Writes the head."""
        save_head(self.module, folder, int8)

    @torch.no_grad()
    def accepted(self, batch: Batch, depth: int) -> tuple[torch.Tensor, int]:
        """See `Objective`."""
        head = self.module
        return accepted_chains([head.ids[head.logits(out).argmax(-1)] for out in self._run(batch, depth)], batch)


def taps(order: Order, layers: int) -> tuple[int, ...]:
    """The layers, of so many, whose states must be recorded: those that the head reads and the last but one."""
    return tuple(dict.fromkeys((*_read(order, layers), layers - 1)))


def _read(order: Order, layers: int) -> tuple[int, ...]:
    if order.start:
        found = read_taps(order.start, layers)
        if not all(0 <= tap <= layers for tap in found):
            raise ValueError(
                f"start: {order.start} reads layers {found}, and the model has {layers}; name a head of it"
            )
        return found
    return order.taps or tuple(dict.fromkeys((min(2, layers), layers // 2, layers - 1)))


def begin(order: Order, target: LoadedModel, texts: Iterable[Recorded]) -> EagleObjective:
    """A head to train, and how."""
    count = len(target.shapes)
    layers = taps(order, count)
    if order.start:
        head = load_head(order.start, target).to(target.device)
    else:
        head = new_head(target.model, _read(order, count), layers, texts, order.vocab, order.intermediate)
    embedding = target.model.get_input_embeddings().weight.detach()
    return EagleObjective(head, embedding, order.turns, order.divergence, 0.0 if order.start else ALONE)
