"""An EAGLE head: one decoder layer that goes on from the target's hidden states by itself (Li et al. 2024, 2025).

The head's entry for position t joins the embedding of token t with a feature of position t - 1: the target's hidden
states of several layers, fused, where the target has been, and one made of the head's own output where it has not. The
product of the output at t with the reduced vocabulary's matrix guesses token t + 1.

There are two forms. In that of the published EAGLE-3 checkpoints, whose tensors' names are used here, only the
attention reads the embedding, beside the feature, and an output is the next feature. In the *joined* form, which is
ours, the two are added up before an ordinary layer, as in the first EAGLE. So the head can begin as the target's last
layer on a linear estimate of what that layer reads, and a small model's narrow values do not stand in the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

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
        joined: Whether it has the joined form.
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
    joined: bool = False


class EagleHead(nn.Module):
    """The head's weights. It embeds tokens by the target's own embedding, which is not part of it."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.tap_norm = TapNorm(shape) if shape.joined else nn.Identity()
        self.fc = nn.Linear(len(shape.taps) * shape.target_hidden, shape.hidden, bias=False)
        self.midlayer = HeadLayer(shape)
        self.norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.again = nn.Linear(shape.hidden, shape.hidden, bias=False) if shape.joined else None
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.ids: torch.Tensor  # [vocab] the target's id of each token
        self.register_buffer("ids", torch.arange(shape.vocab))

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Features of positions where the target has been. [..., taps * target_hidden] -> [..., hidden]."""
        return self.fc(self.tap_norm(taps))

    def feature(self, output: torch.Tensor) -> torch.Tensor:
        """Features of positions where only the head has been. [..., hidden] after the layer -> [..., hidden]."""
        return output if self.again is None else self.again(self.norm(output))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] after the layer -> [..., vocab]."""
        return self.lm_head(self.norm(hidden))


class TapNorm(nn.Module):
    """Brings every layer's states, and every number of them, to one size."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.ones(len(shape.taps) * shape.target_hidden))
        self.width = shape.target_hidden

    def forward(self, taps: torch.Tensor) -> torch.Tensor:
        """[..., taps * target_hidden] -> the same."""
        return rms_norm(taps.unflatten(-1, (-1, self.width)), (self.width,), eps=self.eps).flatten(-2) * self.weight


class HeadLayer(nn.Module):
    """A Llama layer for two vectors for every token."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.join = nn.Linear(shape.hidden, shape.hidden, bias=False) if shape.joined else None
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
        embedded = self.input_layernorm(embedded)
        if self.join is None:
            read = torch.cat([embedded, self.hidden_norm(hidden)], dim=-1)
        else:
            hidden = hidden + self.join(embedded)
            read = self.hidden_norm(hidden)
        hidden = hidden + self.self_attn(read, cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class HeadAttention(nn.Module):
    """Projections around whatever attention the step brings."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.call = AttentionCall(layer=0, scale=shape.head_size**-0.5, window=None, softcap=None)
        reads = shape.hidden if shape.joined else 2 * shape.hidden
        self.q_proj = nn.Linear(reads, shape.heads * shape.head_size, bias=False)
        self.k_proj = nn.Linear(reads, shape.kv_heads * shape.head_size, bias=False)
        self.v_proj = nn.Linear(reads, shape.kv_heads * shape.head_size, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)

    def forward(self, read: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """read: [1, T, hidden, or twice as much] -> [1, T, hidden]."""
        query, key, value = (
            product(read).unflatten(-1, (-1, self.head_size))[0] for product in (self.q_proj, self.k_proj, self.v_proj)
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
