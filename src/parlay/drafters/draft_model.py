"""A small language model that guesses for a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from parlay.bets import Tree
from parlay.config import EngineConfig
from parlay.drafters.levels import LevelDrafter
from parlay.engine.attention import UnsupportedModel, forward_batch
from parlay.engine.batch import ForwardBatch
from parlay.engine.checkpoint import resolve
from parlay.engine.compiling import Compilable, whole_model
from parlay.engine.kv import PagedKV
from parlay.engine.model import LoadedModel, TargetModel, load_model
from parlay.types import Offer, Row


class DraftModel(LevelDrafter):
    """Runs another causal language model, with KV of its own.

    Args:
        loaded: The draft model, on the target's device.
        tree: The largest tree.
        seed: Of sampled guesses.
    """

    name = "draft_model"

    def __init__(self, loaded: LoadedModel, tree: Tree, seed: int = 0) -> None:
        super().__init__(tree, loaded.device, seed)
        self._loaded = loaded
        self._tokens = int(loaded.model.get_input_embeddings().weight.shape[0])
        self._looked_at: dict[int, tuple[int, bool]] = {}  # by row: how many tokens, and whether one is not its own
        self.bytes_per_position = PagedKV.bytes_per_position(loaded.shapes, loaded.dtype)

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`. The draft model must have the target's tokens."""
        if source is None:
            raise ValueError("drafter draft_model: name the model with --drafter draft_model=FOLDER_OR_ID")
        dtype: Any = str(target.dtype).removeprefix("torch.")
        try:
            loaded = load_model(resolve(source), EngineConfig(source, dtype=dtype, device=str(target.device)))
        except UnsupportedModel as error:
            raise ValueError(f"drafter draft_model: {source} cannot be run ({error}); take another model") from error
        _require_same_tokens(loaded, target, source)
        return cls(loaded, tree)

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        super().attach(target)
        self._model = TargetModel(self._loaded, target.kv.num_pages, self.page_size, strict=False)
        # Vocabularies of a family are padded to different sizes.
        self._vocab = min(self._model.vocab_size, target.vocab_size)
        self.ids = None if self._vocab == target.vocab_size else torch.arange(self._vocab, device=self.device)

    def detach(self) -> None:
        """See `Drafter`. Its parts hold each other, so that weights would wait for a garbage collection."""
        segments = self._model.segments
        segments.use([None] * segments.num_layers)  # compiled layers hold weights of their own
        for part in self._loaded.model.modules():
            part._parameters.clear()
            part._buffers.clear()
        del self._model

    def compilables(self) -> list[Compilable]:
        """See `Drafter`."""
        return [whole_model(self._model, "the draft model")]

    def reach(self, row: Row) -> int:
        """Not beyond its own context, and not behind a token that it does not have."""
        done, strange = self._looked_at.get(row.seq, (0, False))
        strange = strange or any(token >= self._tokens for token in row.tokens[done : row.length])
        self._looked_at[row.seq] = row.length, strange
        return 0 if strange else max(0, min(row.max_depth, self._loaded.context - row.length))

    def hear(self, shown: Mapping[int, Sequence[Offer]]) -> None:
        """See `Drafter`. It cannot go on behind tokens that it does not have."""
        super().hear(
            {seq: [offer for offer in some if max(offer.tokens or (0,)) < self._tokens] for seq, some in shown.items()}
        )

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        super().forget(seq)
        self._looked_at.pop(seq, None)

    def forward(self, batch: ForwardBatch, parents: Sequence[int] | None) -> torch.Tensor:
        """See `LevelDrafter`."""
        del parents
        model = self._model
        with forward_batch(model.attention(model.kv, batch)):
            return model.segments(batch.tokens, batch.positions, reads=batch.reads).logits[:, : self._vocab]


def _require_same_tokens(draft: LoadedModel, target: LoadedModel, source: str) -> None:
    """Raises ValueError where a token id means something else to the draft model."""
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if other is not None or len(ours) != len(theirs):
        which = f"token {other!r} has another id" if other is not None else "it has more tokens"
        raise ValueError(
            f"drafter draft_model: {source} has another tokenizer than the model ({which}); take a small model of the "
            "same family"
        )
