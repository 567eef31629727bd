"""How many guesses of a chain are right, counted on texts without running the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parlay.train.dataset import Batch


def accepted_chains(guesses: Sequence[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, int]:
    """How often chains of guesses are right, started at every place of greedy answers but the first of a text.

    Args:
        guesses: By level of the chain, [B, T] the guesses for what follows each place.
        batch: The texts.

    Returns:
        [levels] how many of the chains have their k-th guess accepted, and the number of chains.
    """
    following = batch.tokens[:, 1:]
    answer = batch.answer[:, :-1] & (batch.probs[:, 1:, 0] > 0)
    # A sampled answer would count guesses as wrong that were right.
    greedy = ((batch.ids[:, :-1, 0] == following) | ~answer).all(1, keepdim=True)
    # A chain must not begin where it would leave the text.
    room = torch.nn.functional.pad(answer, (0, len(guesses)))[:, len(guesses) :]
    alive = answer & greedy & room
    alive[:, 0] = False  # what came before it is not there
    chains, found = int(alive.sum()), []
    for level, guess in enumerate(guesses):
        if level:
            alive = torch.nn.functional.pad(alive, (1, 0))[:, :-1]
        alive = alive & (guess[:, :-1] == following)
        found.append(alive.sum())
    return torch.stack(found), chains
