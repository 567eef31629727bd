from __future__ import annotations

import mmap

import pytest
import torch

from parlay.engine import memory
from parlay.engine.memory import Shelf, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (2, 1024, 1024)])
def test_zeros_are_like_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype)
    assert made.dtype is dtype
    assert made.is_contiguous()
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    made.fill_(1)
    assert torch.equal(made, torch.ones(shape, dtype=dtype))


def test_zeros_where_the_system_has_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(zeros((4, 2), torch.float32), torch.zeros(4, 2))


def test_what_is_on_the_shelf_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SHELF_BYTES", 1000)  # so that some tensors need a shelf of their own
    shelf = Shelf()
    tensors = [
        torch.randn(size, 3).to(dtype) for size in (1, 7, 50, 0, 200) for dtype in (torch.float32, torch.bfloat16)
    ]
    kept = [shelf.keep(tensor) for tensor in tensors]
    for tensor, mine in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, mine)
        assert mine.dtype is tensor.dtype
        assert mine.data_ptr() % memory.CACHE_LINE == 0 or not mine.numel()
    kept[0].fill_(5)
    assert all(torch.equal(tensor, mine) for tensor, mine in zip(tensors[1:], kept[1:], strict=True))
