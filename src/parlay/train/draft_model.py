"""Training of a small language model that guesses for a large one: some of its layers, distilled (DistillSpec)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from parlay.config import EngineConfig
from parlay.engine.checkpoint import quiet, resolve
from parlay.engine.model import LoadedModel, load_model
from parlay.train.chains import accepted_chains
from parlay.train.dataset import Batch
from parlay.train.losses import Divergence, Targets, logits_loss
from parlay.train.order import Order
from parlay.train.recording import Recorded


class DraftModelObjective:
    """What a draft model learns: the target's distributions behind recorded texts.

    Args:
        student: The draft model.
        target: Whose tokenizer and way of generating it is saved with.
        divergence: From the target's distribution.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, student: Any, target: LoadedModel, divergence: Divergence) -> None:
        self.module, self._tokenizer = student, target.tokenizer
        self._generation_config = target.model.generation_config
        self._divergence: Divergence = divergence

    def loss(self, batch: Batch, progress: float) -> tuple[torch.Tensor, float]:
        """The loss to go down, and how often a first guess would be accepted at temperature 1."""
        del progress
        learn = batch.probs[..., 0] > 0
        targets = Targets(batch.ids.flatten(0, 1), batch.probs.flatten(0, 1), learn.flatten() / batch.count)
        total, agreement = logits_loss(self._logits(batch).flatten(0, 1), targets, self._divergence)
        return total, float(agreement[learn.flatten()].mean())

    def _logits(self, batch: Batch) -> torch.Tensor:
        """[B, T, vocab]."""
        mask = (batch.probs[..., 0] > 0).long()
        return self.module(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def accepted(self, batch: Batch, depth: int) -> tuple[torch.Tensor, int]:
        """See `accepted_chains`. While a chain is right the model reads the text itself."""
        guesses = self._logits(batch).argmax(-1)
        return accepted_chains([guesses] * depth, batch)

    def save(self, folder: Path, int8: bool) -> None:
        """Writes a folder that any program loads a model from; int8 weights would be for ours only."""
        written = copy.deepcopy(self.module).to(torch.bfloat16 if int8 else torch.float16)
        written.generation_config = self._generation_config
        with quiet():
            written.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


def taps(order: Order, layers: int) -> tuple[int, ...]:
    """It reads tokens only."""
    chosen_layers(order, layers)
    return ()


def begin(order: Order, target: LoadedModel, texts: Iterable[Recorded]) -> DraftModelObjective:
    """A draft model to train, and how."""
    del texts
    if order.start:
        student = _begun(order.start, target)
    else:
        student = new_student(target, chosen_layers(order, len(target.shapes)))
    for part in (student.get_input_embeddings(), student.get_output_embeddings()):
        assert isinstance(part, nn.Module)
        part.requires_grad_(False)
    return DraftModelObjective(student, target, order.divergence)


def chosen_layers(order: Order, layers: int) -> tuple[int, ...]:
    """Which of so many layers a draft model begins with: evenly spread, the first and the last among them."""
    count = max(1, round(layers / 8)) if order.layers is None else order.layers
    if not 0 < count < layers:
        raise ValueError(f"layers: must be from 1 to {layers - 1}, fewer than the model's, not {count}")
    return tuple(round(place * (layers - 1) / max(1, count - 1)) for place in range(count))


def new_student(target: LoadedModel, chosen: Sequence[int]) -> Any:
    """A model of the target's architecture that begins as some of its layers.

    Embedding and vocabulary stay as they are: they are most of a small model, and already the target's; few of their
    lines occur often enough in what is recorded to become better.

    Args:
        target: A checkpoint in memory, which is left as it is.
        chosen: The layers to take.
    """
    config = copy.deepcopy(target.config)
    layers = len(target.layers)
    for name, value in vars(target.config).items():
        if isinstance(value, list | tuple) and len(value) == layers:  # such as the kind of each layer's attention
            setattr(config, name, type(value)(value[layer] for layer in chosen))
    config.num_hidden_layers = len(chosen)
    student: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # eval: no dropout
    student.generation_config = GenerationConfig()  # the target's may change how it samples
    weights = target.model.state_dict()
    place = next(name for name, module in target.model.named_modules() if module is target.layers)
    renamed = {
        name: name.replace(f"{place}.{index}.", f"{place}.{chosen[index]}.", 1)
        for index in range(len(chosen))
        for name in student.state_dict()
        if name.startswith(f"{place}.{index}.")
    }
    student.load_state_dict({name: weights[renamed.get(name, name)] for name in student.state_dict()})
    return student


def _begun(source: str, target: LoadedModel) -> Any:
    """A draft model that is there, in float32."""
    loaded = load_model(resolve(source), EngineConfig(source, dtype="float32", device=str(target.device)))
    if (found := loaded.config.vocab_size) != target.config.vocab_size:
        raise ValueError(
            f"start: {source} has a vocabulary of {found} tokens, and the model has {target.config.vocab_size}; name a "
            "draft model of this model"
        )
    student = loaded.model.eval()
    student.generation_config = GenerationConfig()
    return student
