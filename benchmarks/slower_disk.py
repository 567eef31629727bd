"""Reads of streamed layers held to a rate: the same disk for every step, which a machine that others use is not."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from parlay.engine import streaming
from parlay.options import parse_bytes


def add_read_rate(parser: argparse.ArgumentParser) -> None:
    """The option that says which."""
    parser.add_argument("--read-rate", type=parse_bytes, help="as if the disk read no more bytes a second than these")


@contextmanager
def held_reads(rate: int | None) -> Iterator[None]:
    """Engines that are made meanwhile read no more bytes a second."""

    class Disk(streaming.Disk):
        def fetch(self, number: int, into: torch.Tensor, mark: object) -> None:
            began = time.perf_counter()
            super().fetch(number, into, mark)
            if rate:
                time.sleep(max(0.0, len(into) / rate - (time.perf_counter() - began)))

    with patch.object(streaming, "Disk", Disk):
        yield
