"""Memory for what every step reads whole: weights and KV."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np
import torch

SHELF_BYTES = 64 << 20
CACHE_LINE = 64  # bytes


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in huge pages where the system has them.

    They cost no memory until they are written: the system hands out zeroed pages on first use. With huge pages a step
    looks up fewer addresses.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class Shelf:
    """Keeps tensors side by side, since most weights are smaller than a huge page."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values on the shelf, which is given back when nothing on it is used any more.

        Args:
            tensor: Any shape, on the CPU.
        """
        size = -(-tensor.nbytes // CACHE_LINE) * CACHE_LINE
        if size > len(self._free):
            self._free = zeros((max(size, SHELF_BYTES),), torch.uint8)
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor).data  # autograd's views hold what they are of
