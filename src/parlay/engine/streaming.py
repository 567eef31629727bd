"""Weights that do not fit: layers stream through two slots of memory while the ones before them compute.

As many layers as the budget allows stay where they are; the others take turns in two slots. A thread brings
them, one after the other, while those before compute, also across steps and while drafters guess. Every layer always
has the same slot, so its parameters are views of that slot for good, and neither the model nor compiled programs notice
that they stream.
After Sequoia's offloading (Chen et al. 2024, arXiv 2402.12374, Section 4 and `staylayer` of its prototype).
"""

from __future__ import annotations

import logging
import os
import statistics
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from parlay.config import Offload
from parlay.engine import native
from parlay.engine.layer_files import PAGE, LayerFile, Layout, state_of, write_layer
from parlay.engine.memory import zeros

HUGE_PAGE = 2 << 20  # bytes
PAUSES = 0.1, 1.0  # seconds, before a read that failed is tried again

logger = logging.getLogger(__name__)


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
        self._streamed = placement.streamed
        self._number = {index: number for number, index in enumerate(placement.streamed)}
        self._layouts, self._source, self._slots = layouts, source, slots
        self._held: list[int | None] = [None, None]  # the streamed layer in each slot
        self._coming: list[tuple[int, Future[None]] | None] = [None, None]  # on its way into each
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="parlay-layers")
        self.bytes_read, self.seconds_waited = 0, 0.0
        for index, number in self._number.items():
            layouts[number].lay(layers[index], slots[number % 2])

    def bring(self, index: int) -> None:
        """Waits for a layer; called when the work of all layers before it has been handed out.

        The slot of the last of those is free by then, so what comes into it next is sent for first: the thread goes
        from one read to the other.

        Raises:
            OSError: when it cannot be read; the next call tries again.
        """
        passed = bisect_left(self._streamed, index) - 1
        if passed >= 0 and self._held[passed % 2] == passed:
            self._send_for(self._next_in_slot(passed))
        number = self._number.get(index)
        if number is None:
            return
        began = time.perf_counter()
        slot = number % 2
        self._arrive(slot)
        if self._held[slot] != number:
            self._send_for(number)
            self._arrive(slot)
        if self._held[1 - slot] is None and self._coming[1 - slot] is None:
            self._send_for(self._next_in_slot(number - 1))
        self.seconds_waited += time.perf_counter() - began

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
                self._arrive(number % 2)
                self._send_for(number)
            self._arrive(0)
            self._arrive(1)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(cancel_futures=True)

    def _next_in_slot(self, number: int) -> int:
        """The next streamed layer after this one that has the same slot."""
        following = (n % self.count for n in range(number + 1, number + 1 + self.count))
        return next(n for n in following if n % 2 == number % 2)

    def _send_for(self, number: int) -> None:
        slot, size = number % 2, self._layouts[number].bytes
        self._held[slot] = None
        future = self._reader.submit(self._source.fetch, number, self._slots[slot][:size], self._source.mark())
        self._coming[slot] = number, future

    def _arrive(self, slot: int) -> None:
        """Waits for what is on its way into a slot."""
        coming, self._coming[slot] = self._coming[slot], None
        if coming is not None:
            number, future = coming
            try:
                future.result()
            except OSError:
                other, self._coming[1 - slot] = self._coming[1 - slot], None
                if other is not None:
                    other[1].exception()  # until it is over; whatever came of it, it is sent for again
                raise
            self._held[slot] = number
            self.bytes_read += self._layouts[number].bytes


def stream(
    layers: Sequence[nn.Module],
    offload: Offload,
    budget: int,
    folder: Path,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda layer: None,
) -> StreamedLayers | None:
    """Leaves the layers that fit on the device, and streams the others; None where all of them fit.

    Args:
        layers: On the CPU.
        offload: Where the others are: `disk`, or `cpu` for a CUDA device, in pinned memory.
        budget: Bytes on the device for all of them.
        folder: For one file a layer.
        device: Where they run.
        prepare: Brings a layer into the form in which it is multiplied.

    Raises:
        ValueError: for a budget that is too small, or layers that would stream from the CPU to itself.
        OSError: when the files cannot be written.
    """
    if offload == "cpu" and device.type == "cpu":
        raise ValueError("offload cpu: the model runs on the CPU, whose memory it would leave for itself; choose disk")
    prepare(layers[0])
    Placement.of([size_of(layers[0])] * len(layers), budget)  # says so before anything is written
    files = _written(layers, folder, prepare) if offload == "disk" else []
    layouts = [file.layout for file in files] or [Layout.of(layer) for layer in layers]
    placement = Placement.of([layout.bytes for layout in layouts], budget)
    for index in sorted({*range(len(layers))} - {*placement.streamed}):
        if files:
            memory = aligned(layouts[index].bytes)
            files[index].read(memory)
            layouts[index].lay(layers[index], memory.to(device))
        else:
            layers[index].to(device)
    if not placement.streamed:
        return None
    layouts = [layouts[index] for index in placement.streamed]
    streamed_files = [files[index] for index in placement.streamed] if files else []
    size = max(layout.bytes for layout in layouts)
    if device.type == "cpu":
        return StreamedLayers(layers, placement, layouts, Disk(streamed_files), (aligned(size), aligned(size)))
    pinned = [copied(layers[index], pinned=True) for index in placement.streamed if not files]
    source = _Device(pinned or [aligned(size, pinned=True)], streamed_files, device)
    slots = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    return StreamedLayers(layers, placement, layouts, source, slots)


def _written(layers: Sequence[nn.Module], folder: Path, prepare: Callable[[nn.Module], None]) -> list[LayerFile]:
    """All layers as files; their own memory is given back one by one, so that they are never in it together."""
    files = []
    console = Console(stderr=True)
    for index, layer in enumerate(track(layers, "layers to disk", console=console, transient=True)):
        if index:
            prepare(layer)
        files.append(write_layer(folder / f"layer-{index:05}.safetensors", layer))
        for tensor in state_of(layer).values():
            tensor.data = tensor.new_empty(0)
        native.give_back_memory()
    return files


class Disk:
    """Reads files past the page cache, into the CPU's memory.

    Args:
        files: By number.
    """

    def __init__(self, files: Sequence[LayerFile]) -> None:
        self._files = files
        self._opened = [file.open() for file in files]
        weakref.finalize(self, _close, self._opened)

    def mark(self) -> None:
        """The CPU has done what was handed out."""

    def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
        del mark
        self.read(number, into)

    def read(self, number: int, into: torch.Tensor) -> None:
        """Reads a file, and again where that fails, as on a disk that is far away."""
        for pause in PAUSES:
            try:
                return self._files[number].read(into, self._opened[number])
            except OSError as error:
                logger.warning("reading layers: %s; trying again in %g s", error, pause)
                time.sleep(pause)
        return self._files[number].read(into, self._opened[number])


class _Device:
    """Copies to a CUDA device, beside what computes there, from pinned memory; from files by way of that."""

    def __init__(self, hosts: Sequence[torch.Tensor], files: Sequence[LayerFile], device: torch.device) -> None:
        self._hosts, self._device = hosts, device
        self._disk = Disk(files) if files else None
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        host = self._hosts[number % len(self._hosts)]
        if self._disk is not None:
            self._disk.read(number, host)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            into.copy_(host[: len(into)], non_blocking=True)
        self._stream.synchronize()


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


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
    """[size] bytes that begin at a page, as direct reads want them; where they are not pinned, at a huge one.

    Direct reads into huge pages took 53 ms where others took 75: every page is looked up and held while it is read to.
    """
    page = PAGE if pinned else HUGE_PAGE
    memory = (
        torch.empty(size + page, dtype=torch.uint8, pin_memory=True) if pinned else zeros((size + page,), torch.uint8)
    )
    start = -memory.data_ptr() % page
    return memory[start : start + size]
