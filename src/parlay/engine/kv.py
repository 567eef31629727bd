"""The paged KV store: one tensor per layer, addressed by slot = page * page_size + offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parlay.engine import memory


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps per position."""

    heads: int
    key_size: int
    value_size: int


class PagedKV:
    """Keys and values of every layer by slot, side by side, so that one gather fetches both.

    Pools start zeroed: a masked position is still multiplied by its weight of 0, which only a finite value survives.

    Args:
        layers: What each keeps.
        num_pages: Pages of each pool.
        page_size: Positions per page.
        dtype: Of keys and values.
        devices: One for all layers, or each layer's.
    """

    def __init__(
        self,
        layers: Sequence[KVShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        devices: torch.device | Sequence[torch.device],
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        places = [devices] * len(layers) if isinstance(devices, torch.device) else devices
        self._dtype, self._device = dtype, places[0]
        sizes = [(num_pages, page_size, s.heads, s.key_size + s.value_size) for s in layers]
        self.pools = [_zeros(size, dtype, device) for size, device in zip(sizes, places, strict=True)]
        self.slots = [pool.flatten(0, 1) for pool in self.pools]  # the same memory, slot by slot
        self.keys = [slots[..., : s.key_size] for slots, s in zip(self.slots, layers, strict=True)]
        self.values = [slots[..., s.key_size :] for slots, s in zip(self.slots, layers, strict=True)]

    def keep_beside(self, width: int) -> torch.Tensor:
        """One more vector per slot, for whoever needs it: [slots, width], zeroed, moved and copied as keys are.

        It lies where the first layer's keys are.
        """
        pool = _zeros((self.num_pages, self.page_size, 1, width), self._dtype, self._device)
        self.pools.append(pool)
        self.slots.append(pool.flatten(0, 1))
        return pool.view(-1, width)

    def drop(self, beside: torch.Tensor) -> None:
        """Keeps what `keep_beside` gave no longer."""
        left = [i for i, pool in enumerate(self.pools) if pool.data_ptr() != beside.data_ptr()]
        self.pools, self.slots = [self.pools[i] for i in left], [self.slots[i] for i in left]

    @staticmethod
    def bytes_per_position(layers: Sequence[KVShape], dtype: torch.dtype) -> int:
        return sum(shape.heads * (shape.key_size + shape.value_size) for shape in layers) * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores new positions. slots: [T]; key: [T, heads, key_size]; value: [T, heads, value_size]."""
        # A masked infinity would still spoil every query that meets its page, now or later: 0 * inf is not 0.
        key, value = key.nan_to_num(), value.nan_to_num()
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages (source, destination); a later copy to the same page wins."""
        if copies:
            last = {destination: source for source, destination in copies}
            _copy(self.pools, list(last.values()), list(last))

    def move(self, sources: Sequence[int], destinations: Sequence[int], layers: int | None = None) -> None:
        """Copies slots in every layer, or the first so many; all sources are read before anything is written."""
        if sources:
            _copy(self.slots[:layers], sources, destinations)


def _copy(tensors: Sequence[torch.Tensor], sources: Sequence[int], destinations: Sequence[int]) -> None:
    both = {
        device: (torch.tensor(sources, device=device), torch.tensor(destinations, device=device))
        for device in {tensor.device for tensor in tensors}
    }
    for tensor in tensors:
        source, destination = both[tensor.device]
        tensor.index_copy_(0, destination, tensor.index_select(0, source))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
