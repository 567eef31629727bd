"""How an EAGLE head begins: as the target's last layer, on a linear estimate of what that layer will read.

The layer, its norm and the rows of the vocabulary are the target's own. What the layer would read at the next position
is estimated from the states at this one and the next token's embedding by ridge regression. So the head guesses before
the first step: that of SmolLM2-135M was right at 35 of 100 places of held-out answers (the first line of its card).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import rms_norm

from parlay.drafters.eagle_head import EagleHead, HeadShape, TapNorm
from parlay.train.recording import Recorded, frequent_tokens
from parlay.train.unrolled import turns

FITTED_TOKENS = 60_000  # that the regressions see
RIDGE = 0.02  # per token, where every number read is about 1 in size
LONGEST = 512  # tokens of a text that are run at a time


def new_head(
    model: Any,
    taps: Sequence[int],
    layers: Sequence[int],
    texts: Iterable[Recorded],
    vocab: int,
    intermediate: int | None,
) -> EagleHead:
    """A head for the most frequent tokens.

    Args:
        model: The target, a Hugging Face causal LM.
        taps: Layers that the head reads.
        layers: Layers whose states the texts hold: those, and the last but one.
        texts: What the target wrote.
        vocab: Tokens that it can guess.
        intermediate: Width of its MLP; None takes the target's.
    """
    fitted: list[Recorded] = []

    def noted() -> Iterator[Recorded]:
        for text in texts:
            if sum(map(len, fitted)) < FITTED_TOKENS:
                fitted.append(text)
            yield text

    ids = frequent_tokens(noted(), vocab)
    head = EagleHead(_shape(model, taps, len(ids), intermediate))
    head.ids = ids
    with torch.no_grad():
        head.lm_head.weight.copy_(model.get_output_embeddings().weight[ids])
        _begin_as(head, model)
        before_last = model.config.num_hidden_layers - 1
        _fit(head, model.get_input_embeddings().weight, layers, layers.index(before_last), fitted)
    return head


def _shape(model: Any, taps: Sequence[int], vocab: int, intermediate: int | None) -> HeadShape:
    config = model.config
    hidden, heads = model.get_input_embeddings().weight.shape[1], config.num_attention_heads
    return HeadShape(
        hidden=hidden,
        target_hidden=hidden,
        intermediate=intermediate or getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        vocab=vocab,
        taps=tuple(taps),
        rope_theta=float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)),
        norm_eps=float(getattr(config, "rms_norm_eps", 1e-5)),
        joined=True,
    )


def _begin_as(head: EagleHead, model: Any) -> None:
    """Copies what fits of the target's last layer and norm; what does not passes its input on at first."""
    layer = head.midlayer
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    last = f".{model.config.num_hidden_layers - 1}."
    theirs = {name.split(last, 1)[1]: tensor for name, tensor in model.state_dict().items() if last in name}
    # The target's layer norms what the head calls hidden; its other input is the head's own.
    renamed = {name.replace("input_layernorm", "hidden_norm"): tensor for name, tensor in theirs.items()}
    for part in ("self_attn", "mlp", "hidden_norm", "post_attention_layernorm"):
        own = dict(layer.get_submodule(part).named_parameters(prefix=part))
        if all(name in renamed and renamed[name].shape == weight.shape for name, weight in own.items()):
            for name, weight in own.items():
                weight.copy_(renamed[name])
    norms = [module for name, module in model.named_modules() if name.endswith((".norm", ".final_layer_norm", ".ln_f"))]
    if (
        norms
        and isinstance(weight := getattr(norms[-1], "weight", None), nn.Parameter)
        and len(weight) == len(head.norm.weight)
    ):
        head.norm.weight.copy_(weight)


def _fit(
    head: EagleHead, embedding: torch.Tensor, layers: Sequence[int], wanted: int, texts: Sequence[Recorded]
) -> None:
    """Fits how states and embeddings are read, then how the head's own outputs are."""
    shape, layer = head.shape, head.midlayer
    join, again = layer.join, head.again
    assert join is not None
    assert again is not None
    columns = [layers.index(tap) for tap in shape.taps]

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What there is at one position beside what the last layer reads at the next; the first is no model for it."""
        for text in texts:
            states = text.hidden[1:-1, columns].float().to(embedding.device)
            states = rms_norm(states, states.shape[-1:], eps=shape.norm_eps).flatten(1)
            tokens = rms_norm(embedding[text.tokens[2:].long()].float(), embedding.shape[1:], eps=shape.norm_eps)
            following = text.hidden[2:, wanted].float().to(embedding.device)
            yield torch.cat([states, tokens], dim=1), following

    weight, sizes = ridge(read())
    split = len(shape.taps) * shape.target_hidden
    # So that training finds all numbers of one size.
    cast(TapNorm, head.tap_norm).weight.copy_(1 / sizes[:split])
    layer.input_layernorm.weight.copy_(1 / sizes[split:])
    head.fc.weight.copy_(weight[:, :split] * sizes[:split])
    join.weight.copy_(weight[:, split:] * sizes[split:])

    def run() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for text in texts:
            tokens = text.tokens[None, :LONGEST].long()
            taps = text.hidden[None, :LONGEST, columns].float().flatten(2).to(embedding.device)
            out = turns(head, embedding[tokens].float(), taps, 1)[0]
            yield head.norm(out[0, 1:]), head.fuse(taps)[0, 1:]

    again.weight.copy_(ridge(run())[0])


def ridge(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression in which every line counts by the direction that is wanted, not by its length.

    Args:
        pairs: Each what is read [N, in] and what is wanted [N, out].

    Returns:
        [out, in] the weights, and [in] the root mean square of every number that is read.
    """
    count, length = 0, 0.0
    squares = products = None
    for read, wanted in pairs:
        size = wanted.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        square, product = (read.T @ read).double(), (read.T @ (wanted / size)).double()
        squares = square if squares is None else squares.add_(square)
        products = product if products is None else products.add_(product)
        count, length = count + len(read), length + float(size.sum())
    assert squares is not None
    assert products is not None
    sizes = (squares.diagonal() / count).sqrt().clamp(min=1e-3)  # their inverse must fit into float16
    squares = squares / sizes[:, None] / sizes
    squares.diagonal().add_(RIDGE * count)
    found = torch.linalg.solve(squares, products / sizes[:, None]) / sizes[:, None]
    return (found.T * (length / count)).float(), sizes.float()
