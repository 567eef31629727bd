"""Early exit: the target's own first layers guess, with its own weights, KV and head; a small trained part may help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from parlay.bets import Tree
from parlay.drafters.exit_part import ExitPart, load_exit
from parlay.drafters.levels import LevelDrafter
from parlay.engine.attention import forward_batch
from parlay.engine.batch import ForwardBatch
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.products import pack_products
from parlay.types import Row


class EarlyExit(LevelDrafter):
    """Runs the first layers of the target and its head; what it writes to the target's KV, verification writes again.

    Args:
        tree: The largest tree.
        target: The target.
        exit: Layers to run; a trained part knows how many, and None takes a quarter.
        seed: Of sampled guesses.
    """

    name = "self"
    owns_kv = False

    def __init__(self, tree: Tree, target: LoadedModel, exit: int | ExitPart | None = None, seed: int = 0) -> None:
        super().__init__(tree, target.device, seed)
        self.part = None
        if isinstance(exit, ExitPart):
            self.part = prepared(exit, target)
            exit = exit.shape.exit
        self.layers = range(exit or default_exit(len(target.shapes)))

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`. A user writes a number of layers, or the folder of a trained exit."""
        return cls(tree, target, find_exit(cls.name, source, target))

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        super().attach(target)
        self._model = target

    def read_from(self, row: Row) -> int:
        """What the target has read is there."""
        return row.start

    def note_read(self, row: Row, end: int, guesses: int = 0) -> None:
        """Nothing to note: what it writes is the target's to keep."""
        del row, end, guesses

    def reach(self, row: Row) -> int:
        """Not beside a prompt: what this step reads would be read twice."""
        return row.max_depth if row.start >= row.length - 1 else 0

    def forward(self, batch: ForwardBatch, parents: Sequence[int] | None) -> torch.Tensor:
        """See `LevelDrafter`."""
        del parents
        model = self._model
        with forward_batch(model.attention(model.kv, batch)):
            return model.segments(
                batch.tokens, batch.positions, layers=self.layers, reads=batch.reads, then=self.part
            ).logits


def prepared(part: ExitPart, target: LoadedModel) -> ExitPart:
    """A trained part as it runs beside a target."""
    pack_products(part.to(target.device), target.dtype)
    return part.to(target.dtype).eval()


def find_exit(method: str, source: str | None, target: LoadedModel) -> int | ExitPart | None:
    """What a user wrote: a number of layers, or the folder of a trained exit.

    Raises:
        ValueError: where it is neither.
        CheckpointError: where a trained exit cannot be read.
    """
    count = len(target.shapes)
    if source is None or (source.isdecimal() and 0 < int(source) < count):
        return int(source) if source else None
    if not (folder := Path(source).expanduser()).is_dir():
        raise ValueError(
            f"drafter {method}: write the number of layers to run, from 1 to {count - 1}, or the folder of a trained "
            f"exit, not {source!r}"
        )
    return load_exit(folder, target)


def default_exit(layers: int) -> int:
    """How many layers, of so many, run where nobody says so."""
    return max(1, layers // 4)
