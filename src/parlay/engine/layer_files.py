"""A layer's weights as a file that can be read straight into memory: safetensors, its header as long as a page."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

PAGE = 4096  # bytes: direct reads begin and end at multiples of it
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor is: its name in the layer, and its bytes behind the header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a layer's tensors are in its file, and just so in memory.

    Attributes:
        places: Those of a size that keeps the next one at a cache line come first.
        file_bytes: Of the file, header included.
    """

    places: tuple[Place, ...]
    file_bytes: int

    @property
    def bytes(self) -> int:
        """Of memory that the file is read into: whole pages."""
        return -(-self.file_bytes // PAGE) * PAGE

    @classmethod
    def of(cls, layer: nn.Module) -> Layout:
        """Of a layer's parameters and buffers."""
        found, start = [], 0
        for name, tensor in sorted(state_of(layer).items(), key=lambda item: _order(item[1])):
            found.append(Place(name, tuple(tensor.shape), tensor.dtype, start, start + tensor.nbytes))
            start += tensor.nbytes
        return cls(tuple(found), PAGE + start)

    def lay(self, layer: nn.Module, memory: torch.Tensor) -> None:
        """Makes a layer's tensors views of memory that a file of this layout is read into. memory: [bytes] uint8."""
        tensors = state_of(layer)
        for place in self.places:
            part = memory[PAGE + place.start : PAGE + place.end]
            tensors[place.name].data = part.view(place.dtype).view(place.shape)

    @property
    def header(self) -> bytes:
        """The file's first page."""
        entries = {
            place.name: {"dtype": _NAMES[place.dtype], "shape": place.shape, "data_offsets": (place.start, place.end)}
            for place in self.places
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        if len(text) > PAGE - 8:
            raise ValueError("a layer of more tensors than a page can name cannot be streamed")
        return (PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8)


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a layer computes with, by name."""
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _order(tensor: torch.Tensor) -> tuple[bool, int]:
    return tensor.nbytes % 64 != 0, -tensor.itemsize


@dataclass(frozen=True, slots=True)
class LayerFile:
    """One layer on disk."""

    path: Path
    layout: Layout

    def open(self) -> int:
        """A descriptor for `read`, past the page cache where the file system can do that.

        What it reads stays as it is, whoever replaces or removes the file.
        """
        try:
            return os.open(self.path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:  # a file system without direct reads, such as one in memory
            return os.open(self.path, os.O_RDONLY)

    def read(self, into: torch.Tensor, opened: int | None = None) -> None:
        """Reads all of it.

        Args:
            into: [layout.bytes] uint8 on the CPU, beginning at a page.
            opened: What `open` gave; None opens and closes it.

        Raises:
            OSError: when it cannot be read or is shorter than it was written.
        """
        buffer, done = memoryview(cast(Any, into.numpy())), 0
        file = self.open() if opened is None else opened
        try:
            while done < self.layout.file_bytes:
                count = os.preadv(file, [buffer[done:]], done)
                done += count
                if done < self.layout.file_bytes and (count == 0 or done % PAGE):  # it ends within a page
                    raise OSError(f"{self.path} ends after {done} of {self.layout.file_bytes} bytes")
        finally:
            if opened is None:
                os.close(file)


def write_layer(path: Path, layer: nn.Module) -> LayerFile:
    """Writes a layer, whole or not at all; a file that is there is taken for it if it has the same tensors.

    Raises:
        OSError: when the disk is full or cannot be written.
    """
    layout, tensors = Layout.of(layer), state_of(layer)
    if _fits(path, layout):
        return LayerFile(path, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        try:
            with written.open("wb") as file:
                file.write(layout.header)
                for place in layout.places:
                    file.write(tensors[place.name].detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{path.parent} cannot take the layers that stream: {error.strerror}") from error
        written.replace(path)
    return LayerFile(path, layout)


def _fits(path: Path, layout: Layout) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(PAGE) == layout.header and os.fstat(file.fileno()).st_size == layout.file_bytes
    except FileNotFoundError:
        return False
