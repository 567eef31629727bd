"""Where a model is: on one device, or its layers in order on several, for models that one of them cannot hold.

What surrounds the layers (embedding, position encoding, norm, head) and what drafters run stays on the first device,
and so does every step's input and output: only hidden states go from one device to the next, and back from the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from parlay.engine.attention import AttentionCall, StepAttention
from parlay.engine.batch import ForwardBatch
from parlay.engine.gathered import GatheredAttention
from parlay.engine.kv import PagedKV
from parlay.engine.strict import StrictAttention, Tile


def devices(name: str) -> tuple[torch.device, ...]:
    """Those that a configuration names.

    Raises:
        ValueError: naming the field, where there are no such devices.
    """
    if name == "auto":
        return (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
    found = tuple(_device(part.strip(), name) for part in name.split(","))
    if len(found) > 1 and (
        len(set(found)) < len(found) or any(some.type != "cuda" or some.index is None for some in found)
    ):
        raise ValueError(f"device: {name!r} should name CUDA devices by their numbers, each once: cuda:0,cuda:1")
    return found


def _device(part: str, name: str) -> torch.device:
    try:
        found = torch.device(part)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device: {name!r} is none of auto, cpu, cuda, cuda:N, and several CUDA devices: cuda:0,cuda:1"
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: this machine has no CUDA device that PyTorch can use; choose cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there is no {part}; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return found


def spread(layers: int, over: Sequence[torch.device]) -> tuple[torch.device, ...]:
    """Each layer's device: an equal share for each, the larger ones first.

    Beside its layers the first device holds what surrounds them, so its room decides how much KV there can be.

    Raises:
        ValueError: naming the field, where there are fewer layers than devices.
    """
    if layers < len(over):
        raise ValueError(f"device: {len(over)} devices are too many for {layers} layers")
    share, more = divmod(layers, len(over))
    return tuple(device for turn, device in enumerate(over) for _ in range(share + (turn < more)))


def bring(model: nn.Module, layers: Iterable[nn.Module], home: torch.device, places: Sequence[torch.device]) -> None:
    """Moves a model to its devices, into memory of its own: nothing holds the checkpoint.

    Args:
        model: All of it.
        layers: Its layers.
        home: The device of what surrounds them.
        places: Each layer's device; empty where they are brought by somebody else.
    """
    each = [*layers]
    inside = {module for layer in each for module in layer.modules()}
    _move(set(model.modules()) - inside, home)
    for layer, device in zip(each, places, strict=False):
        _move(layer.modules(), device)


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    for tensor in tensors.values():
        tensor.data = tensor.to(device, copy=True)


class SpreadAttention:
    """Attends on whichever device a layer is; what a step's attention needs is put there once.

    Args:
        make: A step's attention on one device.
    """

    def __init__(self, make: Callable[[torch.device], StepAttention]) -> None:
        self._make, self._there = make, dict[torch.device, StepAttention]()

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        device = query.device
        if device not in self._there:
            self._there[device] = self._make(device)
        # Some layers take an earlier layer's keys and values, which may be elsewhere.
        return self._there[device](call, query, key.to(device), value.to(device))


def gathered_everywhere(kv: PagedKV, batch: ForwardBatch) -> SpreadAttention:
    """`GatheredAttention` for layers on several devices."""
    return SpreadAttention(lambda device: GatheredAttention(kv, batch.to(device)))


def strict_everywhere(kv: PagedKV, tile: Tile) -> SpreadAttention:
    """`StrictAttention` for layers on several devices."""
    return SpreadAttention(lambda device: StrictAttention(kv, tile.to(device)))
