"""An EAGLE-3 head: one decoder layer that goes on from the target's hidden states by itself (Li et al. 2025).

The head's entry for position t joins the embedding of token t with a feature of position t - 1: the target's hidden
states of several layers, fused, where the target has been, and the head's own output where it has not. The output at t
is the next entry's feature, and its product with the reduced vocabulary's matrix guesses token t + 1.

Names of tensors are those of the published EAGLE-3 checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import silu

from parlay.engine.attention import AttentionCall, current_step


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a head.

    Attributes:
        hidden: Width of the head.
        target_hidden: Width of the target's hidden states.
        intermediate: Width inside the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Width of one.
        vocab: Tokens that it can guess.
        taps: Layers of the target after which hidden states are fused.
        rope_theta: Base of the rotary position encoding.
        norm_eps: Of the RMS norms.
    """

    hidden: int
    target_hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    taps: tuple[int, ...]
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class EagleHead(nn.Module):
    """The head's weights. It embeds tokens by the target's own embedding, which is not part of it."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(len(shape.taps) * shape.target_hidden, shape.hidden, bias=False)
        self.midlayer = HeadLayer(shape)
        self.norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.ids: torch.Tensor  # [vocab] the target's id of each token
        self.register_buffer("ids", torch.arange(shape.vocab))

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """[..., taps * target_hidden] -> [..., hidden]."""
        return self.fc(taps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] after the layer -> [..., vocab]."""
        return self.lm_head(self.norm(hidden))


class HeadLayer(nn.Module):
    """A Llama layer whose attention reads two vectors for every token."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = HeadAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = HeadMLP(shape)

    def forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One pass inside a `forward_batch` scope.

        Args:
            hidden: [1, T, hidden] features of the positions before.
            embedded: [1, T, hidden] embeddings of the tokens.
            cos: [T, head_size] of the tokens' positions.
            sin: The same.
        """
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(both, cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class HeadAttention(nn.Module):
    """Projections around whatever attention the step brings."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.call = AttentionCall(layer=0, scale=shape.head_size**-0.5, window=None, softcap=None)
        self.q_proj = nn.Linear(2 * shape.hidden, shape.heads * shape.head_size, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden, shape.kv_heads * shape.head_size, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden, shape.kv_heads * shape.head_size, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)

    def forward(self, both: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """both: [1, T, 2 * hidden] -> [1, T, hidden]."""
        query, key, value = (
            product(both).unflatten(-1, (-1, self.head_size))[0] for product in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = current_step()(self.call, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(out.flatten(1)[None])


class HeadMLP(nn.Module):
    """A gated MLP."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def rotate(some: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position encoding, first half against second. some: [T, heads, D]; cos, sin: [T, D]."""
    first, second = some.chunk(2, dim=-1)
    return some * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def rotary(positions: torch.Tensor, shape: HeadShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the turn of each position. positions: [T] -> two of [T, head_size]."""
    steps = torch.arange(0, shape.head_size, 2, device=positions.device, dtype=torch.float32) / shape.head_size
    angles = positions[:, None].to(torch.float32) * shape.rope_theta**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
