"""How far a drafter's guesses are from the target's distribution: DistillSpec's divergences (Zhou et al. 2024).

A target's distribution is known by its most likely tokens. What lies beyond them, or outside of the drafter's
vocabulary, cannot be learned and is left out of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Divergence = Literal["forward_kl", "reverse_kl", "tvd"]
DIVERGENCES = get_args(Divergence)
CHUNK = 256  # positions whose logits exist at a time
KNOWN = 0.05  # of the target's probability that a head must be able to guess where it learns
FLOOR = 1e-5  # what the target is taken to think of a token that is not among its most likely ones


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What should be guessed at N places.

    Attributes:
        ids: [N, K] tokens of the drafter's vocabulary, each once a line beside any that have no probability.
        probs: [N, K] the target's probability of each; 0 where there is none.
        weights: [N] what each place counts.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    weights: torch.Tensor

    def part(self, places: slice) -> Targets:
        """Those of some of the places."""
        return Targets(self.ids[places], self.probs[places], self.weights[places])


class ReducedVocabulary:
    """Where the target's tokens stand among those that a head can guess.

    Args:
        ids: [V] the target's id of each of the head's tokens.
        size: Tokens of the target.
    """

    def __init__(self, ids: torch.Tensor, size: int) -> None:
        self._place = torch.full((size,), -1)
        self._place[ids] = torch.arange(len(ids))

    def of(self, ids: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is left of the target's distributions.

        Args:
            ids: [..., K] tokens of the target.
            probs: [..., K] their probabilities.

        Returns:
            [..., K] the head's tokens, [..., K] their probabilities, 0 where it has none, and [...] whether enough is
            left to learn from.
        """
        places = self._place[ids]
        left = probs * (places >= 0)
        return places.clamp(min=0), left, left.sum(-1) > KNOWN


Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Each rule takes q [N, V], which it may overwrite, and the target's ids and probabilities [N, K]. It returns the
# divergence [N] and its gradient by the logits [N, V].


def _forward_kl(q: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p, q) with p normalised over the drafter's vocabulary."""
    p = probs / probs.sum(-1, keepdim=True).clamp(min=1e-9)
    found = q.gather(1, ids).clamp(min=1e-30)
    loss = (p * (p.clamp(min=1e-30).log() - found.log())).sum(-1)
    return loss, q.scatter_add_(1, ids, -p)


def _reverse_kl(q: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q, p) with a floor under p."""
    log_p = torch.full_like(q, FLOOR).scatter_reduce_(1, ids, probs, "amax").log_()
    distance = q.clamp(min=1e-30).log_().sub_(log_p)
    loss = (q * distance).sum(-1)
    return loss, q.mul_(distance.sub_(loss[:, None]))


def _tvd(q: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - sum of min(p, q), which is the rejection rate of a single guess."""
    below = torch.zeros_like(q)  # 1 where q should grow
    below.scatter_reduce_(1, ids, (q.gather(1, ids) < probs).to(q.dtype), "amax")
    shared = (q * below).sum(-1)
    loss = 1 - torch.minimum(q.gather(1, ids), probs).sum(-1)
    return loss, q.mul_(shared[:, None] - below)


RULES: dict[Divergence, Rule] = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "tvd": _tvd}


def _weighed(logits: torch.Tensor, targets: Targets, rule: Rule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted sum of the divergences, its gradient by the logits, and the sum of min(p, q) at each place."""
    q = logits.softmax(-1)
    agreement = torch.minimum(q.gather(1, targets.ids), targets.probs).sum(-1)
    loss, gradient = rule(q, targets.ids, targets.probs)
    return (loss * targets.weights).sum(), gradient.mul_(targets.weights[:, None]), agreement


class _HeadLoss(torch.autograd.Function):
    """A vocabulary's product and divergence together, chunk by chunk, so that few logits exist at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: Targets, rule: Rule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        near, factor = hidden.to(dtype), weight.to(dtype)
        to_hidden, to_weight = torch.empty_like(near), torch.zeros_like(weight)
        total = weight.new_zeros(())
        agreed = []
        for at in range(0, len(hidden), CHUNK):
            part = slice(at, at + CHUNK)
            some = near[part]
            loss, gradient, agreement = _weighed((some @ factor.T).to(weight.dtype), targets.part(part), rule)
            total += loss
            agreed.append(agreement)
            gradient = gradient.to(dtype)
            to_hidden[part] = gradient @ factor
            to_weight += gradient.T @ some
        ctx.save_for_backward(to_hidden.to(hidden.dtype), to_weight)
        agreement = torch.cat(agreed) if agreed else hidden.new_zeros(0)
        ctx.mark_non_differentiable(agreement)
        return total, agreement

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * gradients[0], to_weight * gradients[0], None, None


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: Targets, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of divergences of softmax(hidden @ weight.T) from the target.

    Args:
        hidden: [N, hidden], normed.
        weight: [V, hidden].
        targets: Of the N places.
        divergence: Which one.

    Returns:
        The sum, and [N] the sum of min(p, q) at each place: how often one sampled guess would be accepted.
    """
    total, agreement = _HeadLoss.apply(hidden, weight, targets, RULES[divergence])  # type: ignore[misc]
    return total, agreement


class _LogitsLoss(torch.autograd.Function):
    """The divergence of logits that are there, with little beside them but their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: Targets, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
        to_logits = torch.empty_like(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total, agreed = logits.new_zeros((), dtype=wide), []
        for at in range(0, len(logits), CHUNK):
            part = slice(at, at + CHUNK)
            loss, to_logits[part], agreement = _weighed(logits[part].to(wide), targets.part(part), rule)
            total += loss
            agreed.append(agreement)
        ctx.save_for_backward(to_logits)
        agreement = torch.cat(agreed) if agreed else logits.new_zeros(0)
        ctx.mark_non_differentiable(agreement)
        return total, agreement

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (to_logits,) = ctx.saved_tensors
        return to_logits * gradients[0], None, None


def logits_loss(logits: torch.Tensor, targets: Targets, divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """As `head_loss`, of logits from a vocabulary that is not trained. logits: [N, V]."""
    total, agreement = _LogitsLoss.apply(logits, targets, RULES[divergence])  # type: ignore[misc]
    return total, agreement
