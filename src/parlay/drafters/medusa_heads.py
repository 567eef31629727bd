"""Medusa: heads that guess several tokens at once from one hidden state of the target (Cai et al. 2024).

Where the target's own head says which token comes next, head k says which one comes k + 2 places after the one that was
read, counted from 0. Each is some residual blocks and a vocabulary's matrix; our own heads share one matrix.

Names of tensors are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.functional import silu


@dataclass(frozen=True, slots=True)
class MedusaShape:
    """Sizes of the heads.

    Attributes:
        hidden: Width of what the target's head reads.
        heads: How many there are, that is how deep they can guess.
        layers: Residual blocks in each.
        vocab: Tokens that they can guess.
        shared: Whether all heads have the same vocabulary's matrix.
    """

    hidden: int
    heads: int
    layers: int
    vocab: int
    shared: bool


class ResidualBlock(nn.Module):
    """A linear layer whose activation is added to what it reads; it begins as nothing."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return hidden + silu(self.linear(hidden))


class MedusaHeads(nn.Module):
    """All heads' weights."""

    def __init__(self, shape: MedusaShape) -> None:
        super().__init__()
        self.shape = shape
        self.heads = nn.ModuleList()
        for _ in range(shape.heads):
            head = nn.ModuleList(ResidualBlock(shape.hidden) for _ in range(shape.layers))
            if not shape.shared:
                head.append(nn.Linear(shape.hidden, shape.vocab, bias=False))
            self.heads.append(head)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False) if shape.shared else None
        self.ids: torch.Tensor  # [vocab] the target's id of each token
        self.register_buffer("ids", torch.arange(shape.vocab))

    def product(self, head: int) -> nn.Linear:
        """The vocabulary's matrix of a head."""
        if self.lm_head is not None:
            return self.lm_head
        return cast(nn.Linear, cast(nn.ModuleList, self.heads[head])[-1])

    def state(self, head: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a head multiplies with its vocabulary's matrix. hidden: [..., hidden] -> [..., hidden]."""
        for block in cast(nn.ModuleList, self.heads[head])[: self.shape.layers]:
            hidden = block(hidden)
        return hidden

    def forward(self, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """What the first heads guess.

        Args:
            hidden: [..., hidden], what the target's head reads.
            count: How many heads.

        Returns:
            [count, ..., vocab] logits.
        """
        states = torch.stack([self.state(head, hidden) for head in range(count)])
        if self.lm_head is not None:
            return self.lm_head(states)
        return torch.stack([self.product(head)(state) for head, state in enumerate(states)])
