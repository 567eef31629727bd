"""EAGLE: a one-layer head that goes on from the target's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch

from parlay.bets import Tree
from parlay.drafters.eagle_files import load_head
from parlay.drafters.eagle_head import EagleHead, rotary
from parlay.drafters.levels import LevelDrafter
from parlay.engine import self_check
from parlay.engine.attention import forward_batch
from parlay.engine.batch import ForwardBatch, PackedRow, join, kept_places, pack_row
from parlay.engine.compiled import EXAMPLE, CompiledLayers, Example, LayerProgram, Noted
from parlay.engine.compiling import Compilable
from parlay.engine.kv import KVShape, PagedKV
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.path_attention import PathAttention
from parlay.engine.products import pack_products
from parlay.types import Row, RowResult


class Eagle(LevelDrafter):
    """Runs a head over the target's features, which it keeps by slot beside the target's KV.

    Features come from every verification, whoever guessed, so that nothing is missing after a prefix hit, a preemption
    or a spell of being off; the head's own KV is then caught up from them.

    Args:
        head: The weights.
        tree: The largest tree.
        target: Whose hidden states and embedding it uses.
        seed: Of sampled guesses.
    """

    name = "eagle"
    window = 128  # features tell of what came before, so little is lost by reading no more of a long prompt

    def __init__(self, head: EagleHead, tree: Tree, target: LoadedModel, seed: int = 0) -> None:
        super().__init__(tree, target.device, seed)
        pack_products(head.to(target.device), target.dtype)
        self.head = head.to(target.dtype).eval()
        self.taps = head.shape.taps
        self.ids = head.ids
        self._embed = target.model.get_input_embeddings()
        self._dtype = target.dtype
        self._shape = KVShape(head.shape.kv_heads, head.shape.head_size, head.shape.head_size)
        kept = PagedKV.bytes_per_position([self._shape], target.dtype)
        self.bytes_per_position = kept + head.shape.hidden * target.dtype.itemsize  # its KV and a feature
        self._cos, self._sin = rotary(torch.arange(target.context, device=target.device), head.shape, target.dtype)
        self._program: LayerProgram | None = None
        self._outputs = torch.zeros(0)  # [N, hidden] of the last pass, where it was read

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`."""
        if source is None:
            raise ValueError(
                "drafter eagle: name a head with --drafter eagle=FOLDER_OR_ID, or make one with parlay train"
            )
        return cls(load_head(source, target), tree, target)

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        super().attach(target)
        self._attention = target.attention
        self._target_kv = target.kv
        self._features = target.kv.keep_beside(self.head.shape.hidden)
        self._kv = PagedKV([self._shape], target.kv.num_pages, self.page_size, self._dtype, self.device)

    def detach(self) -> None:
        """See `Drafter`."""
        self._target_kv.drop(self._features)

    def compilables(self) -> list[Compilable]:
        """See `Drafter`."""
        return [Compilable("the EAGLE head", self._compiled_layers, self._adopt)]

    @torch.inference_mode()
    def _compiled_layers(self) -> CompiledLayers:
        kv, rows = self._example()
        batch = join(rows, [True] * len(rows), self.device)
        hidden, noted = self._inputs(batch, self._embed(batch.tokens))
        example = Example(hidden, [noted], PathAttention(kv, batch))
        return CompiledLayers([self.head.midlayer], [self.head.midlayer.self_attn.call], example, repr(self.head.shape))

    @torch.inference_mode()
    def _adopt(self, programs: Sequence[LayerProgram]) -> None:
        """Takes the compiled layer, if it computes what the layer computes on steps of several sizes."""
        kv, rows = self._example()
        for some in (rows, rows[:1], [pack_row((1,), 1, rows[0].pages.tolist(), self.page_size)]):
            batch = join(some, [True] * len(some), self.device)
            hidden, noted = self._inputs(batch, self._embed(batch.tokens))
            with forward_batch(PathAttention(kv, batch)):
                expected = self.head.midlayer(hidden, *noted[0])
                kept = kv.slots[0][batch.slots]
                out = programs[0](hidden, noted)
                written = kv.slots[0][batch.slots]
            assert out is not None
            self_check.require_close("the output", 0, out[0], expected[0], hidden[0])
            self_check.require_close("the KV", 0, written, kept, torch.zeros_like(kept))
        self._program = programs[0]

    def _example(self) -> tuple[PagedKV, list[PackedRow]]:
        """A step of `EXAMPLE` tokens, and pages for it."""
        size, tree = self.page_size, Tree((-1, -1, 0, 0, 1, 2))
        kv = PagedKV([self._shape], 10, size, self._dtype, self.device)
        counts = (EXAMPLE - len(tree) - 8, 8)
        pages = [[first + index // size % 4 for index in range(0, size + 1 + EXAMPLE, size)] for first in (1, 5)]
        known = [pack_row((1,) * counts[0], size + 1 + counts[0], pages[0], size, tree, (2,) * len(tree))]
        return kv, [*known, pack_row((3,) * counts[1], size + 1 + counts[1], pages[1], size)]

    def _inputs(self, batch: ForwardBatch, before: torch.Tensor) -> tuple[torch.Tensor, Noted]:
        """The layer's hidden state and its other arguments. before: [T, hidden]."""
        embedded, positions = self._embed(batch.tokens)[None], batch.positions
        if any(row.skipped for row in batch.rows):  # rows that skip others read these keys too: they know their place
            skipped = np.repeat([row.skipped for row in batch.rows], [len(row.tokens) for row in batch.rows])
            positions = positions + torch.from_numpy(skipped).to(self.device)
        return before[None], ((embedded, self._cos[positions], self._sin[positions]), {})

    def reach(self, row: Row) -> int:
        """The feature before the last known token must be there."""
        return row.max_depth if row.start >= row.length - 1 else 0

    def forward(self, batch: ForwardBatch, parents: Sequence[int] | None) -> torch.Tensor:
        """See `LevelDrafter`."""
        if parents is None:
            slots = np.concatenate([self._slots_before(row) for row in batch.rows])
            before = self._features[torch.from_numpy(slots).to(self.device)]
        else:
            before = self.head.feature(self._outputs[torch.tensor(parents, device=self.device)])
        hidden, noted = self._inputs(batch, before)
        step = self._attention(self._kv, batch)
        if self._program is not None and isinstance(step, PathAttention):
            hidden = self._program.run(hidden, noted[0], step)
        else:
            with forward_batch(step):
                hidden = self.head.midlayer(hidden, *noted[0])
        self._outputs = hidden[0].index_select(0, batch.reads)
        return self.head.logits(self._outputs)

    def _slots_before(self, row: PackedRow) -> np.ndarray:
        """[q] the slot of the position before each; before the first there is the null page, which holds zeros."""
        place = row.positions - 1
        slots = row.pages[np.maximum(place, 0) // self.page_size] * self.page_size + place % self.page_size
        return np.where(place < 0, 0, slots)

    @torch.inference_mode()
    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """Keeps the features of known tokens and of accepted guesses, where their KV is by now."""
        super().commit(rows, results, taps)
        lines, slots = kept_places(rows, results, self.page_size)
        chosen = torch.tensor(lines, device=self.device)
        states = torch.cat([taps[layer].index_select(0, chosen) for layer in self.taps], dim=-1)
        self._features.index_copy_(0, torch.tensor(slots, device=self.device), self.head.fuse(states))
