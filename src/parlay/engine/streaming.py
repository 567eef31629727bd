"""Weights that do not fit: layers stream through two slots of memory while the ones before them compute.

As many layers as the budget allows stay where they are; the others take turns in two slots. A thread brings the next
one while the present one computes, also across steps and while drafters guess. Every layer always has the same slot, so
its parameters are views of that slot for good, and neither the model nor compiled programs notice that they stream.
After Sequoia's offloading (Chen et al. 2024, arXiv 2402.12374, Section 4 and `staylayer` of its prototype).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from parlay.config import Offload
from parlay.engine.layer_files import PAGE, LayerFile, Layout, state_of, write_layer


class Source(Protocol):
    """Where layers come from."""

    def mark(self) -> object:
        """What a slot's layer, whose work was handed out by now, has to reach before the slot may be overwritten."""
        ...

    def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
        """Brings a streamed layer's bytes into a slot; returns when they are there.

        Raises:
            OSError: when they cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Which layers stay and which stream.

    Attributes:
        streamed: Their indices, rising; none where everything fits.
        slot_bytes: What each of the two slots takes.
    """

    streamed: tuple[int, ...]
    slot_bytes: int

    @classmethod
    def of(cls, sizes: Sequence[int], budget: int) -> Placement:
        """As many layers as fit beside two slots stay, spread evenly so that reading and computing take turns.

        Args:
            sizes: Bytes of each layer.
            budget: Bytes for all layers.

        Raises:
            ValueError: for a budget that does not hold two layers.
        """
        slot = max(sizes)
        if sum(sizes) <= budget:
            return cls((), 0)
        if budget < 2 * slot:
            raise ValueError(
                f"memory_budget: {budget / 2**20:.1f} MiB does not hold two layers of {slot / 2**20:.1f} MiB, through "
                f"which the others stream; give {-(-2 * slot // 2**20)} MiB or more"
            )
        count = len(sizes) - (budget - 2 * slot) // slot
        count += count % 2 if count < len(sizes) else 0  # of an even number the first's slot is free when the last runs
        return cls(tuple(round(place * len(sizes) / count) for place in range(count)), slot)


class StreamedLayers:
    """Brings each layer's weights before it runs.

    Args:
        layers: The decoder layers; those that stream give up their own memory.
        placement: Which of them stream.
        layouts: By streamed layer, where its tensors are in a slot.
        source: Where they come from.
        slots: Two, of `placement.slot_bytes` or more.

    Attributes:
        bytes_read: In all.
        seconds_waited: That computing stood still for reading.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        placement: Placement,
        layouts: Sequence[Layout],
        source: Source,
        slots: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._number = {index: number for number, index in enumerate(placement.streamed)}
        self._layouts, self._source, self._slots = layouts, source, slots
        self._held: list[int | None] = [None, None]  # the streamed layer in each slot
        self._coming: tuple[int, Future[None]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="parlay-layers")
        self.bytes_read, self.seconds_waited = 0, 0.0
        for index, number in self._number.items():
            layouts[number].lay(layers[index], slots[number % 2])

    def bring(self, index: int) -> None:
        """Waits for a layer, and has the next one come; called when all layers before it are done.

        Raises:
            OSError: when it cannot be read; the next call tries again.
        """
        number = self._number.get(index)
        if number is None:
            return
        began = time.perf_counter()
        self._arrive()
        if self._held[number % 2] != number:
            self._send_for(number)
            self._arrive()
        self.seconds_waited += time.perf_counter() - began
        following = (number + 1) % len(self._number)
        if following % 2 != number % 2 and self._held[following % 2] != following:
            self._send_for(following)

    @property
    def count(self) -> int:
        """Layers that stream."""
        return len(self._layouts)

    @property
    def bytes_per_pass(self) -> int:
        """Read for every pass over all layers."""
        return sum(layout.bytes for layout in self._layouts)

    def time_reading(self, times: int) -> float:
        """Median seconds of reading all of it, while nothing else happens."""
        found = []
        for _ in range(times):
            began = time.perf_counter()
            for number in range(self.count):
                self._arrive()
                self._send_for(number)
            self._arrive()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(cancel_futures=True)

    def _send_for(self, number: int) -> None:
        self._held[number % 2] = None
        size = self._layouts[number].bytes
        future = self._reader.submit(self._source.fetch, number, self._slots[number % 2][:size], self._source.mark())
        self._coming = number, future

    def _arrive(self) -> None:
        """Waits for what is on its way."""
        if self._coming is not None:
            (number, future), self._coming = self._coming, None
            future.result()
            self._held[number % 2] = number
            self.bytes_read += self._layouts[number].bytes


def stream(
    layers: Sequence[nn.Module], offload: Offload, budget: int, folder: Path, device: torch.device
) -> StreamedLayers | None:
    """Leaves the layers that fit on the device, and streams the others; None where all of them fit.

    Args:
        layers: On the CPU, packed where that is where they run.
        offload: Where the others are: `disk`, or `cpu` for a CUDA device, in pinned memory.
        budget: Bytes on the device for all of them.
        folder: For one file a layer.
        device: Where they run.

    Raises:
        ValueError: for a budget that is too small, or layers that would stream from the CPU to itself.
        OSError: when the files cannot be written.
    """
    if offload == "cpu" and device.type == "cpu":
        raise ValueError("offload cpu: the model runs on the CPU, whose memory it would leave for itself; choose disk")
    placement = Placement.of([size_of(layer) for layer in layers], budget)
    for index in sorted({*range(len(layers))} - {*placement.streamed}):
        layers[index].to(device)
    if not placement.streamed:
        return None
    chosen = [layers[index] for index in placement.streamed]
    layouts, files = [Layout.of(layer) for layer in chosen], list[LayerFile]()
    if offload == "disk":
        names = (f"layer-{index:05}.safetensors" for index in placement.streamed)
        files = [write_layer(folder / name, layer) for name, layer in zip(names, chosen, strict=True)]
    size = max(layout.bytes for layout in layouts)
    if device.type == "cpu":
        return StreamedLayers(layers, placement, layouts, _Disk(files), (aligned(size), aligned(size)))
    hosts = [aligned(size, pinned=True)] if files else [copied(layer, pinned=True) for layer in chosen]
    slots = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    return StreamedLayers(layers, placement, layouts, _Device(hosts, files, device), slots)


class _Disk:
    """Reads files past the page cache, into the CPU's memory."""

    def __init__(self, files: Sequence[LayerFile]) -> None:
        self._files = files

    def mark(self) -> None:
        """The CPU has done what was handed out."""

    def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
        del mark
        self._files[number].read(into)


class _Device:
    """Copies to a CUDA device, beside what computes there, from pinned memory; from files by way of that."""

    def __init__(self, hosts: Sequence[torch.Tensor], files: Sequence[LayerFile], device: torch.device) -> None:
        self._hosts, self._files, self._device = hosts, files, device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        host = self._hosts[number % len(self._hosts)]
        if self._files:
            self._files[number].read(host)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            into.copy_(host[: len(into)], non_blocking=True)
        self._stream.synchronize()


def size_of(layer: nn.Module) -> int:
    """Bytes that a layer takes in a slot."""
    return Layout.of(layer).bytes


def copied(layer: nn.Module, pinned: bool = False) -> torch.Tensor:
    """[bytes] a layer as its file would have it in memory."""
    layout, tensors = Layout.of(layer), state_of(layer)
    memory = aligned(layout.bytes, pinned)
    for place in layout.places:
        part = memory[PAGE + place.start : PAGE + place.end]
        part.copy_(tensors[place.name].detach().contiguous().view(-1).view(torch.uint8))
    return memory


def aligned(size: int, pinned: bool = False) -> torch.Tensor:
    """[size] bytes that begin at a page, as direct reads want them."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]
