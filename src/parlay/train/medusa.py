"""Training of Medusa heads on a target that stays as it is (Medusa-1, Cai et al. 2024, 2.2.1)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.functional import pad

from parlay.drafters.medusa_files import load_heads, save_heads
from parlay.drafters.medusa_heads import MedusaHeads, MedusaShape
from parlay.engine.model import LoadedModel
from parlay.train.chains import accepted_chains
from parlay.train.dataset import Batch
from parlay.train.losses import Divergence, ReducedVocabulary, Targets, head_loss
from parlay.train.order import Order
from parlay.train.recording import Recorded, frequent_tokens

DECAY = 0.8  # what a head counts, compared with the one before it


class MedusaObjective:
    """What Medusa heads learn, and how good they are.

    Args:
        heads: The weights.
        size: Tokens of the target.
        layers: Of the target.
        divergence: From the target's distribution.
        base: The target's name.
    """

    def __init__(self, heads: MedusaHeads, size: int, layers: int, divergence: Divergence, base: str) -> None:
        self.module, self._base = heads, base
        self.taps = (layers + 1,)
        self._divergence: Divergence = divergence
        self._vocabulary = ReducedVocabulary(heads.ids, size)

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss to go down, and how often the first head's guess would be accepted at temperature 1.

        Head k learns at t what the target said behind token t + k + 1, which is all about token t + k + 2.
        """
        del progress
        places, probs, known = self._vocabulary.of(batch.ids, batch.probs)
        hidden = batch.hidden[:, :, 0]
        total, first = hidden.new_zeros(()), 0.0
        for head in range(self.module.shape.heads):
            learn = known[:, head + 1 :]
            weights = torch.full((int(learn.sum()),), DECAY**head / batch.count)
            targets = Targets(places[:, head + 1 :][learn], probs[:, head + 1 :][learn], weights)
            state = self.module.state(head, hidden[:, : learn.shape[1]][learn])
            loss, agreement = head_loss(state, self.module.product(head).weight, targets, self._divergence)
            total = total + loss
            first = first if head else float(agreement.mean())
        return total, first

    @torch.no_grad()
    def accepted(self, batch: Batch, depth: int) -> tuple[torch.Tensor, int]:
        """See `Objective`."""
        before = pad(batch.hidden[:, :-1, 0], (0, 0, 1, 0))  # what was read before each place
        guesses = []
        for head in range(min(depth, self.module.shape.heads)):
            guess = self.module.ids[self.module.product(head)(self.module.state(head, before)).argmax(-1)]
            guesses.append(pad(guess, (head, 0), value=-1)[:, : guess.shape[1]])  # made so many places before
        none = torch.full_like(batch.tokens, -1)
        return accepted_chains([*guesses, *(none for _ in range(depth - len(guesses)))], batch)

    def save(self, folder: Path, int8: bool) -> None:
        """Writes the heads."""
        save_heads(self.module, folder, int8, self._base)


def taps(order: Order, layers: int) -> tuple[int, ...]:
    """Behind so many layers: what the target's own head reads."""
    del order
    return (layers + 1,)


def begin(order: Order, target: LoadedModel, texts: Iterable[Recorded]) -> MedusaObjective:
    """Heads to train, and how."""
    if order.start:
        heads = load_heads(order.start, target).to(target.device)
    else:
        heads = new_heads(target.model.get_output_embeddings().weight, texts, order.heads, order.vocab)
    return MedusaObjective(heads, target.config.vocab_size, len(target.shapes), order.divergence, order.model)


def new_heads(output: torch.Tensor, texts: Iterable[Recorded], count: int, vocab: int) -> MedusaHeads:
    """Heads that begin by guessing the next token once more, with the most frequent tokens.

    They share one vocabulary's matrix, which is most of what heads weigh and what a small batch waits for: with four
    heads of 8192 tokens for hidden states of 576 numbers there are 6 million weights to read, instead of 20.

    Args:
        output: [tokens, hidden] the target's own head.
        texts: Whose tokens are counted.
        count: Heads.
        vocab: Tokens that they can guess.
    """
    ids = frequent_tokens(texts, vocab)
    heads = MedusaHeads(MedusaShape(output.shape[1], count, layers=1, vocab=len(ids), shared=True))
    heads.ids = ids
    assert heads.lm_head is not None
    with torch.no_grad():
        heads.lm_head.weight.copy_(output[ids])
    return heads
