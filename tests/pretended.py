"""Devices that this machine does not have: tensors that say they are there and compute here.

Their values are real, and whatever mixes tensors of two devices fails as it would on real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parlay.engine import compute_unit, model, placement

HERE = torch.device("cpu")
DEVICES = torch.device("meta:0"), torch.device("meta:1")  # a kind that PyTorch knows and never has to wake
MOVES = torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Elsewhere:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # a view must be of its tensor's kind, wherever it is taken
            found = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device, **like)  # type: ignore
        found.held = held
        return found

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Elsewhere:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Elsewhere(self.held.new_tensor(data, **options), self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Makes new tensors on pretended devices, too, in this thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [some for some in tree_leaves((args, kwargs)) if isinstance(some, torch.Tensor)]
    there = {some.device for some in tensors if some.device != HERE or some.ndim}  # a number may come from anywhere
    moves = func.overloadpacket in MOVES
    if len(there) > 1 and not moves:
        raise RuntimeError(f"{func} mixes {', '.join(map(str, there))}")
    device = torch.device(kwargs.get("device") or (tensors[0].device if moves else next(iter(there), HERE)))
    known = {id(some.held): some for some in tensors if isinstance(some, Elsewhere)}

    def held(some: Any) -> Any:
        return some.held if isinstance(some, Elsewhere) else HERE if isinstance(some, torch.device) else some

    def wrapped(some: Any) -> Any:
        if not isinstance(some, torch.Tensor):
            return some
        if id(some) in known and known[id(some)].device == device:
            return known[id(some)]
        return Elsewhere(some, device)

    copies = {"copy": True} if func.overloadpacket is torch.ops.aten.to and device != tensors[0].device else {}
    out = func(*tree_map(held, args), **tree_map(held, kwargs) | copies)
    return out if device == HERE else tree_map(wrapped, out)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has engines that are made from now on spread their layers over pretended devices."""
    real, generator, run = torch.tensor, torch.Generator, compute_unit.Unit.run

    def tensor(data: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.Tensor:
        made = real(data, dtype=dtype)
        return made if device is None else made.to(device)

    def move(modules: Iterable[nn.Module], device: torch.device) -> None:
        for module in modules:
            registered: list[dict[str, Any]] = [module._parameters, module._buffers]
            for kept in registered:
                for name, weight in [*kept.items()]:
                    if weight is not None:
                        _, there = moved.setdefault(id(weight), (weight, Elsewhere(weight.data.clone(), device)))
                        assert there.device == device, "a weight is wanted on two devices"
                        kept[name] = there

    def beside(unit: compute_unit.Unit, work: Any) -> Any:
        def pretending() -> Any:
            with Pretending():
                return work()

        return run(unit, pretending)

    moved: dict[int, tuple[Any, Elsewhere]] = {}
    named = {"pretended": DEVICES} | {str(device): (device,) for device in DEVICES}
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(model, "devices", lambda name: named.get(name) or placement.devices(name))
    monkeypatch.setattr(placement, "_move", move)
    monkeypatch.setattr(compute_unit.Unit, "run", beside)
