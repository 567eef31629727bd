"""Training an EAGLE head as it will be used: going on from its own output (training-time test, Li et al. 2025, 3.2).

Turn 0 goes over a text with the target's features everywhere. Turn k goes over it again with the features that the head
makes of its outputs of turn k - 1, so that its entry at t is what the head computes there after k guesses of its own.
Its attention sees turn 0 up to t - k, where the target had been, and of the positions since then what the turn in
question made of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from parlay.drafters.eagle_head import EagleHead, rotary
from parlay.engine.attention import AttentionCall, forward_batch


@dataclass(slots=True, eq=False)
class TurnAttention:
    """Attention of one turn after another over a padded batch of texts."""

    texts: int
    length: int
    earlier: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # keys and values of each turn

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """query: [texts * length, heads, D]; key and value with their own heads -> as query."""
        heads, folds = query.shape[1], query.shape[1] // key.shape[1]
        query, key, value = (
            some.unflatten(0, (self.texts, self.length)).transpose(1, 2) for some in (query, key, value)
        )
        key, value = key.repeat_interleave(folds, 1), value.repeat_interleave(folds, 1)
        self.earlier.append((key, value))
        turn = len(self.earlier) - 1
        keys, values = self.earlier[0]
        scores = query @ keys.transpose(-1, -2) * call.scale  # [texts, heads, T, T]
        seen = torch.ones(self.length, self.length, dtype=torch.bool, device=query.device).tril(-turn)
        scores = scores.masked_fill(~seen, float("-inf"))
        own = [_back(some, turn - k) for k, (some, _) in enumerate(self.earlier) if k]
        if own:
            scores = torch.cat([scores, *((query * some).sum(-1, keepdim=True) * call.scale for some in own)], dim=-1)
        weights = scores.softmax(-1)
        out = weights[..., : self.length] @ values
        for k in range(1, turn + 1):
            out = out + weights[..., self.length + k - 1, None] * _back(self.earlier[k][1], turn - k)
        return out.transpose(1, 2).reshape(-1, heads, out.shape[-1])


def _back(some: torch.Tensor, by: int) -> torch.Tensor:
    """What stood so many positions before. some: [texts, heads, T, D]."""
    return some if by == 0 else torch.nn.functional.pad(some, (0, 0, by, 0))[:, :, :-by]


def turns(head: EagleHead, embedded: torch.Tensor, taps: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The head's outputs in every turn; the first k of turn k mean nothing.

    Args:
        head: The head.
        embedded: [B, T, hidden] the target's embeddings of the tokens.
        taps: [B, T, taps * target_hidden].
        count: Turns.

    Returns:
        Each [B, T, hidden], in which place t goes on from token t.
    """
    texts, length = embedded.shape[:2]
    positions = torch.arange(length, device=embedded.device).repeat(texts)
    cos, sin = rotary(positions, head.shape, embedded.dtype)
    tokens = embedded.reshape(1, texts * length, -1)
    feature = head.fuse(taps).to(embedded.dtype)  # as it is added up, whatever type products are in
    outputs = []
    with forward_batch(TurnAttention(texts, length)):
        for _ in range(count):
            before = torch.nn.functional.pad(feature, (0, 0, 1, 0))[:, :-1]
            out = head.midlayer(before.reshape(1, texts * length, -1), tokens, cos, sin).view(texts, length, -1)
            outputs.append(out)
            feature = head.feature(out).to(embedded.dtype)
    return outputs
