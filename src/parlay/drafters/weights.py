"""Files of drafters' weights: a description and safetensors, ours in int8 where that is wanted."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from parlay.engine.checkpoint import CheckpointError

CONFIG, WEIGHTS, SCALE = "config.json", "model.safetensors", "_scale"


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], int8: bool) -> None:
    """Matrices in int8 with a scale per line, or in float16; what is no matrix of numbers stays as it is."""
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and int8:
            scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            written[name] = (tensor / scale).round().to(torch.int8).contiguous()
            written[name + SCALE] = scale.to(torch.float32)
        else:
            written[name] = (tensor.to(torch.float16) if tensor.is_floating_point() else tensor).contiguous()
    partial = folder / f"{WEIGHTS}.partial"
    save_file(written, partial)
    partial.rename(folder / WEIGHTS)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors, those in int8 unpacked to float32.

    Raises:
        CheckpointError: when there are none, or they cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        how = "holds only pickled weights, which can run code when opened: convert them to safetensors"
        raise CheckpointError(f"{folder} {how if pickled else 'holds no .safetensors weights: check the path'}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from error
    for name in [name for name in tensors if name.endswith(SCALE)]:
        scale, whole = tensors.pop(name), name.removesuffix(SCALE)
        tensors[whole] = tensors[whole].float() * scale
    return tensors


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Fills a module, all of it and with nothing left over.

    Raises:
        CheckpointError: naming what is missing, unknown or of another size.
    """
    expected = module.state_dict()
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has the unknown", weights.keys() - expected.keys()),
        ("has other sizes in", {n for n in expected if n in weights and weights[n].shape != expected[n].shape}),
    ):
        if names:
            some = textwrap.shorten(", ".join(sorted(names)), 120)
            raise CheckpointError(f"{source} {what} {some}: it is no head of this kind, or not whole")
    module.load_state_dict(dict(weights))


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder says about its weights.

    Raises:
        CheckpointError: when it says nothing that can be read.
    """
    path = folder / CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it should describe the head") from error
