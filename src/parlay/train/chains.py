"""How many guesses of a chain are right, counted on texts without running the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parlay.train.dataset import Batch


def accepted_chains(guesses: Sequence[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, int]:
    """How often chains of guesses are right where steps would begin: each behind what the one before it emitted.

    Chains at every place would count easy stretches, through which steps leap, as often as hard ones. Only greedy
    answers are gone through: a sampled one would count guesses as wrong that were right.

    Args:
        guesses: By level of the chain, [B, T] the guesses for what follows each place.
        batch: The texts.

    Returns:
        [levels] in how many of the steps the k-th guess is accepted, and the number of steps.
    """
    following = batch.tokens[:, 1:]
    answer = batch.answer[:, :-1] & (batch.probs[:, 1:, 0] > 0)
    greedy = ((batch.ids[:, :-1, 0] == following) | ~answer).all(1, keepdim=True)
    # A chain must not begin where it would leave the text, and not where what came before is not there.
    begins = answer & greedy & _ahead(answer, len(guesses))
    begins[:, 0] = False
    alive, lengths = begins, torch.zeros_like(begins, dtype=torch.long)
    for level, guess in enumerate(guesses):
        alive = alive & _ahead(guess[:, :-1] == following, level)
        lengths += alive
    found, steps = torch.zeros(len(guesses)), 0
    for may, accepted in zip(begins.tolist(), lengths.tolist(), strict=True):
        place = may.index(True) if True in may else len(may)
        while place < len(may) and may[place]:
            found[: accepted[place]] += 1
            steps += 1
            place += accepted[place] + 1
    return found, steps


def _ahead(some: torch.Tensor, by: int) -> torch.Tensor:
    """What stands so many places later. some: [B, T]."""
    return torch.nn.functional.pad(some, (0, by))[:, by:]
