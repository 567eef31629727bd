"""Medusa checkpoints: published ones, and our own, in which the heads share a reduced vocabulary and may be in int8.

A folder holds `config.json` and safetensors. Published descriptions do not always name as many heads as there are, so
heads are counted among the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parlay.drafters.medusa_heads import MedusaHeads, MedusaShape
from parlay.drafters.weights import CONFIG, load_weights, read_config, read_tensors, write_tensors
from parlay.engine.checkpoint import CheckpointError, fetch_folder
from parlay.engine.model import LoadedModel

SHARED, OFFSETS = "lm_head.weight", "d2t"


def load_heads(source: str, target: LoadedModel) -> MedusaHeads:
    """Reads heads.

    Args:
        source: A local folder or a Hugging Face id.
        target: Whom they should guess for.

    Raises:
        CheckpointError: when the files cannot be had or read.
        ValueError: when the heads were made for another model.
    """
    folder = fetch_folder(source)
    tensors = read_tensors(folder)
    shape = _shape(read_config(folder), tensors, target, source)
    offsets = tensors.pop(OFFSETS, torch.zeros(shape.vocab, dtype=torch.long)).long()
    heads = MedusaHeads(shape)
    shared = {name: tensors.pop(name).float() for name in (SHARED,) if shape.shared}
    load_weights(heads.heads, {name: tensor.float() for name, tensor in tensors.items()}, source)
    ids = torch.arange(len(offsets), device=offsets.device) + offsets
    if len(ids) != shape.vocab or int(ids.min()) < 0 or int(ids.max()) >= target.config.vocab_size:
        raise ValueError(f"drafter {source}: guesses tokens that the model does not have; take heads of this model")
    heads.ids = ids
    if heads.lm_head is not None:
        heads.lm_head.load_state_dict({"weight": shared[SHARED]})
    return heads


def save_heads(heads: MedusaHeads, folder: Path, int8: bool, base: str = "") -> None:
    """Writes heads; in int8 every output of a product has a scale of its own.

    Args:
        heads: The weights.
        folder: Where to; made if it is not there.
        int8: Matrices in int8, else in float16.
        base: The target's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = heads.shape
    config = {
        "model_type": "medusa",
        "medusa_num_heads": shape.heads,
        "medusa_num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "base_model_name_or_path": base,
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in heads.heads.state_dict().items()}
    if heads.lm_head is not None:
        tensors[SHARED] = heads.lm_head.weight.detach().cpu()
    # As EAGLE heads have it: what to add to an index.
    tensors[OFFSETS] = heads.ids.cpu() - torch.arange(shape.vocab, device="cpu")
    write_tensors(folder, tensors, int8)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shape(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: LoadedModel, source: str
) -> MedusaShape:
    try:
        named, layers = int(config["medusa_num_heads"]), int(config["medusa_num_layers"])
        if named < 1 or layers < 1:
            raise ValueError(f"the numbers {named} and {layers}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {CONFIG} lacks or garbles {error}; it describes no Medusa heads") from error
    shared = SHARED in tensors
    matrix = tensors.get(SHARED if shared else f"0.{layers}.weight")
    if matrix is None or matrix.ndim != 2:
        raise CheckpointError(f"{source} lacks 0.{layers}.weight: it holds no Medusa heads, or not whole")
    vocab, hidden = matrix.shape
    found = int(target.model.get_output_embeddings().weight.shape[1])
    if hidden != found:
        raise ValueError(
            f"drafter {source}: was made for hidden states of {hidden} numbers, and this model has {found}; take heads "
            "of this model, or train some with parlay train"
        )
    if OFFSETS not in tensors and vocab != target.config.vocab_size:
        raise ValueError(
            f"drafter {source}: was made for a vocabulary of {vocab} tokens, and this model has "
            f"{target.config.vocab_size}; take heads of this model"
        )
    heads = len({name.split(".")[0] for name in tensors if name.split(".")[0].isdecimal()})
    last = f"{named - 1}.{layers - 1}.linear.weight"
    if last not in tensors:  # before room is made for as many as the description says
        raise CheckpointError(f"{source} lacks {last}: it holds fewer Medusa heads than {CONFIG} says, or not whole")
    return MedusaShape(hidden, heads, layers, vocab, shared)
