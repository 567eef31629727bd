"""EAGLE-3 checkpoints: published ones, and our own, which may have the joined form and be in int8.

A folder holds `config.json` and safetensors. Ids of layers follow two customs: those in `eagle_config` count from 0 and
name the layer whose output is taken; those at the top level (as vLLM counts) say after how many layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parlay.drafters.eagle_head import EagleHead, HeadShape
from parlay.drafters.weights import CONFIG, load_weights, read_config, read_tensors, write_tensors
from parlay.engine.checkpoint import CheckpointError, fetch_folder
from parlay.engine.model import LoadedModel


def load_head(source: str, target: LoadedModel) -> EagleHead:
    """Reads a head.

    Args:
        source: A local folder or a Hugging Face id.
        target: Whom it should guess for.

    Raises:
        CheckpointError: when the files cannot be had or read.
        ValueError: when the head was made for another model.
    """
    folder = fetch_folder(source)
    tensors = read_tensors(folder)
    shape = _shape(read_config(folder), tensors, target, source)
    ids = _ids(tensors, shape.vocab)
    if int(ids.min()) < 0 or int(ids.max()) >= target.config.vocab_size:
        raise ValueError(f"drafter {source}: guesses tokens that the model does not have; take a head of this model")
    head = EagleHead(shape)
    weights = {name.replace("layers.0.", "midlayer."): tensor.float() for name, tensor in tensors.items()}
    for name in ("d2t", "t2d", "embed_tokens.weight", "ids"):  # the target's own embedding is used
        weights.pop(name, None)
    load_weights(head, weights | {"ids": ids}, source)
    return head


def save_head(head: EagleHead, folder: Path, int8: bool) -> None:
    """Writes a head; in int8 every output of a product has a scale of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = head.shape
    config = {
        "architectures": ["ParlayJoinedHead" if shape.joined else "LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "target_hidden_size": shape.target_hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "num_hidden_layers": 1,
        "draft_vocab_size": shape.vocab,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in shape.taps]},
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items() if name != "ids"}
    # As published heads have it: what to add to an index.
    tensors["d2t"] = head.ids.cpu() - torch.arange(shape.vocab, device="cpu")
    write_tensors(folder, tensors, int8)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shape(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], target: LoadedModel, source: str) -> HeadShape:
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        shape = HeadShape(
            hidden=hidden,
            target_hidden=int(config.get("target_hidden_size") or hidden),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocab=int(config.get("draft_vocab_size") or config["vocab_size"]),
            taps=_taps(config, len(target.shapes)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=float(config.get("rms_norm_eps") or 1e-5),
            joined="ParlayJoinedHead" in (config.get("architectures") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {CONFIG} lacks or garbles {error}; it describes no EAGLE-3 head") from error
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"drafter {source}: its position encoding ({kind}) is not supported; take another head")
    if config.get("norm_before_residual"):
        raise ValueError(f"drafter {source}: norm_before_residual is not supported; take another head")
    found = int(target.model.get_input_embeddings().weight.shape[1])
    if not found == shape.target_hidden == shape.hidden:
        made = shape.target_hidden if shape.target_hidden != found else shape.hidden
        raise ValueError(
            f"drafter {source}: was made for hidden states of {made} numbers, and this model has {found}; take a head "
            "of this model, or train one with parlay train"
        )
    if "t2d" in tensors and len(tensors["t2d"]) != target.config.vocab_size:
        raise ValueError(
            f"drafter {source}: was made for a vocabulary of {len(tensors['t2d'])} tokens, and this model has "
            f"{target.config.vocab_size}; take a head of this model"
        )
    if not all(0 <= tap <= len(target.shapes) for tap in shape.taps):
        raise ValueError(f"drafter {source}: reads layers {shape.taps}, and this model has {len(target.shapes)}")
    return shape


def read_taps(source: str, layers: int) -> tuple[int, ...]:
    """The layers, of so many, that a head reads.

    Raises:
        CheckpointError: when its description cannot be had or read.
    """
    try:
        return _taps(read_config(fetch_folder(source)), layers)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {CONFIG} garbles the layers that the head reads ({error})") from error


def _taps(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if nested:
        return tuple(int(layer) + 1 for layer in nested)
    return tuple(map(int, config.get("eagle_aux_hidden_state_layer_ids") or default_taps(layers)))


def default_taps(layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high layer, as published heads have them."""
    return min(2, layers), layers // 2, max(0, layers - 3)


def _ids(tensors: Mapping[str, torch.Tensor], vocab: int) -> torch.Tensor:
    offsets = tensors.get("d2t", torch.zeros(vocab, dtype=torch.long, device="cpu")).long()
    return torch.arange(len(offsets), device=offsets.device) + offsets
