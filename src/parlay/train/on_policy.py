"""Texts that a draft model writes itself while it learns, and what the target says of them (DistillSpec).

What the target wrote shows a draft model only places that the target gets to; its own guesses take it to others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from parlay.engine.model import LoadedModel
from parlay.train.dataset import Batch
from parlay.train.recording import TOP


class OnPolicy:
    """Puts the draft model's own texts in place of some batches.

    Args:
        student: The draft model, a Hugging Face causal LM.
        target: Whom it learns from.
        share: Of the steps, from 0 to 1.
        seed: Decides, with a step's number, everything that is random.
    """

    def __init__(self, student: Any, target: LoadedModel, share: float, seed: int) -> None:
        self._student, self._target, self._share, self._seed = student, target, share, seed

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch itself, or what the draft model writes behind its prompts."""
        chance = random.Random(f"{self._seed} on-policy {step}")
        if chance.random() >= self._share:
            return batch
        starts = prompt_lengths(batch)
        texts = written(self._student, batch, starts, self._target.eos, chance.getrandbits(62))
        return scored(self._target.model, texts, starts)


def prompt_lengths(batch: Batch) -> list[int]:
    """[B] where each text's answer begins; half of what there is, where a text was cut and begins in its answer."""
    lengths = (batch.probs[..., 0] > 0).sum(1).tolist()
    firsts = [
        int(line.int().argmax()) if line.any() else length for line, length in zip(batch.answer, lengths, strict=True)
    ]
    return [
        min(first + 1, length) if first else max(1, length // 2) for first, length in zip(firsts, lengths, strict=True)
    ]


@torch.no_grad()
def written(student: Any, batch: Batch, starts: Sequence[int], ends: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Texts with the batch's prompts and at most its lengths, sampled from a model as it is.

    Args:
        student: A Hugging Face causal LM.
        batch: Texts.
        starts: [B] the lengths of their prompts.
        ends: Tokens that end a text, and are no part of it.
        seed: Decides what is sampled.
    """
    lengths = (batch.probs[..., 0] > 0).sum(1).tolist()
    width, longest = max(starts), max(length - start for length, start in zip(lengths, starts, strict=True))
    if not longest:
        return [line[:length] for line, length in zip(batch.tokens, lengths, strict=True)]
    prompts = torch.zeros(len(starts), width, dtype=torch.long)  # padded in front
    for line, start in enumerate(starts):
        prompts[line, width - start :] = batch.tokens[line, :start]
    mask = torch.arange(width) >= width - torch.tensor(starts)[:, None]
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest, eos_token_id=list(ends) or None,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = student.generate(prompts, attention_mask=mask.long(), generation_config=how)[:, width:]
    texts = []
    for line, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = found[line, : length - start]
        is_end = torch.isin(own, torch.tensor(list(ends), dtype=torch.long))
        end = int(is_end.int().argmax()) if is_end.any() else len(own)
        texts.append(torch.cat([batch.tokens[line, :start], own[:end]]))
    return texts


@torch.no_grad()
def scored(target: Any, texts: Sequence[torch.Tensor], starts: Sequence[int]) -> Batch:
    """A batch of texts with the target's distributions, from one plain pass.

    Args:
        target: A Hugging Face causal LM.
        texts: [T] each.
        starts: Where their answers begin.
    """
    tokens = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    place = torch.arange(tokens.shape[1])
    inside = place < torch.tensor([len(text) for text in texts])[:, None]
    logits = target(input_ids=tokens, attention_mask=inside.long(), use_cache=False).logits
    best = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
    return Batch(
        tokens=tokens,
        hidden=torch.zeros(*tokens.shape, 0, 0),
        ids=best.indices,
        probs=best.values.exp() * inside[..., None],
        answer=inside & (place >= torch.tensor(starts)[:, None] - 1),
    )
