"""The trained part of an early exit, and its files: `config.json` and safetensors, which may be in int8."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from parlay.drafters.weights import CONFIG, load_weights, read_tensors, write_tensors
from parlay.engine.checkpoint import CheckpointError
from parlay.engine.model import LoadedModel

ARCHITECTURE = "ParlayEarlyExit"


@dataclass(frozen=True, slots=True)
class ExitShape:
    """What a trained exit fits.

    Attributes:
        exit: Layers of the target that run before it.
        layers: Layers that the target has.
        hidden: Numbers in its hidden states.
        inner: Width of the part's MLP.
    """

    exit: int
    layers: int
    hidden: int
    inner: int


class ExitPart(nn.Module):
    """One residual block, position by position, between the target's first layers and its norm and vocabulary.

    Without training it changes nothing. It reads no other position, so it keeps nothing and is trained as it is used.
    """

    def __init__(self, shape: ExitShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden], after the last layer that runs -> as hidden."""
        normed = self.norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def save_exit(part: ExitPart, folder: Path, model: str, int8: bool) -> None:
    """Writes a trained exit of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, {name: tensor.detach().cpu() for name, tensor in part.state_dict().items()}, int8)
    config = {"architectures": [ARCHITECTURE], "model": model} | asdict(part.shape)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_exit(folder: Path, target: LoadedModel) -> ExitPart:
    """Reads a trained exit.

    Raises:
        CheckpointError: when the files cannot be read.
        ValueError: when it was made for another model.
    """
    shape = read_shape(folder)
    found = len(target.shapes), int(target.model.get_input_embeddings().weight.shape[1])
    if found != (shape.layers, shape.hidden) or not 0 < shape.exit < shape.layers:
        raise ValueError(
            f"drafter {folder}: was made to leave after {shape.exit} of {shape.layers} layers with {shape.hidden} "
            f"numbers each, and this model has {found[0]} with {found[1]}; train one with parlay train --kind self"
        )
    part = ExitPart(shape)
    load_weights(part, {name: tensor.float() for name, tensor in read_tensors(folder).items()}, str(folder))
    return part


def read_shape(folder: Path) -> ExitShape:
    """What a trained exit in a folder fits.

    Raises:
        CheckpointError: when there is none.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["architectures"] != [ARCHITECTURE]:
            raise ValueError(f"it is a {config['architectures']}")
        return ExitShape(**{field.name: int(config[field.name]) for field in fields(ExitShape)})
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} describes no trained exit ({reason}); make one with parlay train --kind self"
        ) from error
