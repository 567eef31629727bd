"""What a drafter learns from: tokens, the target's hidden states behind them, and what it thought would come next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parlay.bets import Bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.engine.batch import Draft, kept_places
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel, TargetModel
from parlay.train.conversations import ANSWER
from parlay.types import Offer, Row, RowResult

TOP = 64  # most likely next tokens that are kept of every distribution


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One conversation, as the target went through it.

    Attributes:
        tokens: [T].
        start: Where the answer begins.
        hidden: [T, taps, hidden] in bfloat16, after each tapped layer.
        ids: [T, TOP] the most likely next tokens, at temperature 1.
        logprobs: [T, TOP] in float16.
    """

    tokens: torch.Tensor
    start: int
    hidden: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)


class Recorder(Drafter):
    """Stands among the drafters and guesses nothing: it writes down what passes by.

    Hidden states are kept by slot beside the KV, so that those of a reused prefix are there without being computed.

    Args:
        target: Whose states are kept.
        taps: Layers after which.
    """

    name = "recorder"

    def __init__(self, target: LoadedModel, taps: Sequence[int]) -> None:
        self._layers = (*taps, len(target.layers))
        self.taps = tuple(sorted(set(self._layers)))
        self._width = int(target.model.get_input_embeddings().weight.shape[1])
        self.bytes_per_position = len(self._layers) * self._width * target.dtype.itemsize
        self._rows: dict[int, Row] = {}
        self.found: list[Recorded] = []  # the answers that have ended

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        self._model = target
        self._kept = target.kv.keep_beside(len(self._layers) * self._width).unflatten(1, (-1, self._width))

    def detach(self) -> None:
        """See `Drafter`."""
        self._model.kv.drop(self._kept.flatten(1))

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """Nothing."""
        return [None] * len(rows)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        """Nothing."""
        return [None] * len(rows)

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """Keeps the states of the step."""
        lines, slots = kept_places(rows, results, self._model.kv.page_size)
        states = torch.stack([taps[layer] for layer in self._layers], dim=1)
        chosen = states[torch.tensor(lines, device=states.device)]
        self._kept.index_copy_(0, torch.tensor(slots, device=states.device), chosen)
        self._rows.update({row.seq: row for row in rows})

    def forget(self, seq: int) -> None:
        """A choice has ended; what its pages held is there until the next step."""
        row = self._rows.pop(seq, None)
        if row is None or not row.request.id.startswith(ANSWER):
            return
        size, count = self._model.kv.page_size, row.start + row.count
        slots = [row.pages[place // size] * size + place % size for place in range(count)]
        states = self._kept[torch.tensor(slots, device=self._kept.device)].cpu()
        ids, logprobs = self._next_tokens(states[:, -1])
        hidden = states[:, :-1].to(torch.bfloat16)
        tokens = torch.tensor(row.tokens[:count], dtype=torch.int32)
        self.found.append(Recorded(tokens, len(row.request.prompt), hidden, ids, logprobs))

    @torch.inference_mode()
    def _next_tokens(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logprobs = [], []
        for logits in self._model.logits(last.to(self._model.device)):
            best = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
            ids.append(best.indices.to("cpu", torch.int32))
            logprobs.append(best.values.to("cpu", torch.float16))
        return torch.cat(ids), torch.cat(logprobs)


def recording_engine(config: EngineConfig, taps: Sequence[int]) -> Engine:
    """An engine whose only drafter is a recorder, so that the memory for its states is counted with the KV pool's."""
    return Engine(config, lambda target: Drafters([Recorder(target, taps)]))


def frequent_tokens(texts: Iterable[Recorded], count: int) -> torch.Tensor:
    """[V <= count] the tokens that occur most often, in texts or as what was likeliest to come next, in order."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.ids[:, 0].tolist())
        counts.update(text.tokens.tolist())
    return torch.tensor(sorted(token for token, _ in counts.most_common(count)))


FIELDS = ("tokens", "hidden", "ids", "logprobs")


def save(path: Path, some: Sequence[Recorded]) -> None:
    """Writes conversations to one safetensors file, which appears whole or not at all."""
    tensors = {name: torch.cat([getattr(one, name) for one in some]).contiguous() for name in FIELDS}
    tensors["lengths"] = torch.tensor([len(one) for one in some])
    tensors["starts"] = torch.tensor([one.start for one in some])
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def load(path: Path) -> Iterator[Recorded]:
    """The conversations of one file."""
    tensors = load_file(path)
    lengths = tensors["lengths"].tolist()
    parts = [tensors[name].split(lengths) for name in FIELDS]
    for start, tokens, hidden, ids, logprobs in zip(tensors["starts"].tolist(), *parts, strict=True):
        yield Recorded(tokens, start, hidden, ids, logprobs)
