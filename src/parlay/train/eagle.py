"""Training of an EAGLE-3 head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parlay.drafters.eagle_files import default_taps, save_head
from parlay.drafters.eagle_head import EagleHead, HeadShape
from parlay.engine.model import LoadedModel
from parlay.train.dataset import Batch
from parlay.train.losses import Divergence, Targets, head_loss
from parlay.train.order import Order
from parlay.train.recording import Recorded
from parlay.train.unrolled import turns

DECAY = 0.9  # what a guess counts, compared with the one before it


class EagleObjective:
    """What an EAGLE head learns, and how good it is.

    Args:
        head: The weights.
        embedding: [vocab, hidden] the target's, frozen.
        turns: How far the head goes on from its own output while it learns.
        divergence: From the target's distribution.
    """

    def __init__(self, head: EagleHead, embedding: torch.Tensor, turns: int, divergence: Divergence) -> None:
        self.module, self._embedding = head, embedding
        self.taps = head.shape.taps
        self._turns = turns
        self._divergence: Divergence = divergence
        self._place = torch.full((len(embedding),), -1)  # of each of the target's tokens in the head's vocabulary
        self._place[head.ids] = torch.arange(len(head.ids))

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss to go down, and how often a first guess would be accepted at temperature 1.

        Args:
            batch: Texts.
            progress: From 0 to 1. The first turn is learned alone at first, which is several times as fast.
        """
        places = self._place[batch.ids]
        probs = batch.probs * (places >= 0)
        places = places.clamp(min=0)
        known = probs.sum(-1) > 0.05
        total, first = batch.hidden.new_zeros(()), 0.0
        count = self._turns if progress > 0.35 else 1
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
        """How often chains of guesses are right, started at every place of greedy answers.

        Returns:
            [depth] how many of the chains have their k-th guess accepted, and the number of chains.
        """
        following = batch.tokens[:, 1:]
        answer = batch.answer[:, :-1] & (batch.probs[:, 1:, 0] > 0)
        # A sampled answer would count guesses as wrong that were right.
        greedy = ((batch.ids[:, :-1, 0] == following) | ~answer).all(1, keepdim=True)
        # A chain must not begin where it would leave the text.
        room = torch.nn.functional.pad(answer, (0, depth))[:, depth:]
        alive = answer & greedy & room
        chains, found = int(alive.sum()), []
        for turn, out in enumerate(self._run(batch, depth)):
            guess = self.module.ids[self.module.logits(out[:, :-1]).argmax(-1)]
            if turn:
                alive = torch.nn.functional.pad(alive, (1, 0))[:, :-1]
            alive = alive & (guess == following)
            found.append(alive.sum())
        return torch.stack(found), chains


def taps(order: Order, layers: int) -> tuple[int, ...]:
    """The layers, of so many, that a head reads."""
    return order.taps or default_taps(layers)


def begin(order: Order, target: LoadedModel, texts: Iterable[Recorded]) -> EagleObjective:
    """A head to train, and how."""
    layers = taps(order, len(target.shapes))
    head = new_head(target.model, layers, texts, order.vocab, order.intermediate)
    embedding = target.model.get_input_embeddings().weight.detach()
    return EagleObjective(head, embedding, order.turns, order.divergence)


def new_head(
    model: Any, taps: Sequence[int], texts: Iterable[Recorded], vocab: int, intermediate: int | None
) -> EagleHead:
    """A head that begins as the target's last layer where their sizes agree, with the most frequent tokens.

    Args:
        model: The target, a Hugging Face causal LM.
        taps: Layers that it reads.
        texts: Whose tokens are counted.
        vocab: Tokens that it can guess.
        intermediate: Width of its MLP; None takes the target's.
    """
    config = model.config
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    hidden = embedding.shape[1]
    heads = config.num_attention_heads
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.ids[:, 0].tolist())
        counts.update(text.tokens.tolist())
    ids = torch.tensor(sorted(token for token, _ in counts.most_common(vocab)))
    shape = HeadShape(
        hidden=hidden,
        target_hidden=hidden,
        intermediate=intermediate or getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        vocab=len(ids),
        taps=tuple(taps),
        rope_theta=float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)),
        norm_eps=float(getattr(config, "rms_norm_eps", 1e-5)),
    )
    head = EagleHead(shape)
    head.ids = ids
    with torch.no_grad():
        head.lm_head.weight.copy_(output[ids])
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, -hidden:] += torch.eye(hidden)  # begin with the highest layer
    _begin_as(head, model)
    return head


@torch.no_grad()
def _begin_as(head: EagleHead, model: Any) -> None:
    """Copies what fits of the target's last layer and norm, from where a head learns faster than from nothing."""
    weights = model.state_dict()
    last = f".{model.config.num_hidden_layers - 1}."
    layer = {name.split(last, 1)[1]: tensor for name, tensor in weights.items() if last in name}
    own = dict(head.midlayer.named_parameters())
    hidden = head.shape.hidden
    for name, tensor in layer.items():
        source = tensor.float()
        name = name.replace("input_layernorm", "hidden_norm")  # the target's layer reads what the head calls hidden
        weight = own.get(name)
        if weight is None:
            continue
        if weight.shape == source.shape:
            weight.copy_(source)
        elif weight.shape == (source.shape[0], 2 * hidden) and source.shape[1] == hidden:
            weight[:, hidden:] = source
            weight[:, :hidden] *= 0.1
    norms = [module for name, module in model.named_modules() if name.endswith((".norm", ".final_layer_norm", ".ln_f"))]
    if norms and isinstance(weight := getattr(norms[-1], "weight", None), nn.Parameter) and len(weight) == hidden:
        head.norm.weight.copy_(weight)
