"""What a drafter learns from: tokens, the target's hidden states behind them, and what it thought would come next."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parlay.drafters.base import Drafter, Drafters
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.train.conversations import answers, turns
from parlay.types import Bet, Offer, Row, RowResult

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
    """Stands among the drafters and guesses nothing: it writes down what passes by."""

    name = "recorder"

    def __init__(self, engine: Engine, taps: Sequence[int]) -> None:
        self._model = engine.model
        self.taps = tuple(sorted({*taps, self._model.segments.num_layers}))
        self._wanted = tuple(taps)
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._rows: dict[int, tuple[array[int], int]] = {}
        self.recorded: list[Recorded] = []

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        return [None] * len(rows)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet]) -> list[Draft | None]:
        return [None] * len(rows)

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        start = 0
        states = torch.stack([taps[layer] for layer in self.taps], dim=1).to(torch.bfloat16)
        for row, got in zip(rows, results, strict=True):
            if row.start == 0:  # a row that was preempted begins anew
                self._parts[row.seq] = []
                self._rows[row.seq] = row.tokens, len(row.request.prompt)
            self._parts[row.seq].append(states[start : start + row.count].clone())
            start += row.count + len(got.tree)

    def forget(self, seq: int) -> None:
        parts, (tokens, start) = self._parts.pop(seq, []), self._rows.pop(seq, (array("i"), 0))
        if parts:
            states = torch.cat(parts)
            ids, logprobs = self._next_tokens(states[:, -1])
            hidden = states[:, [self.taps.index(layer) for layer in self._wanted]].contiguous()
            self.recorded.append(
                Recorded(torch.tensor(tokens[: len(states)], dtype=torch.int32), start, hidden, ids, logprobs)
            )

    @torch.inference_mode()
    def _next_tokens(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logprobs = [], []
        for logits in self._model.logits(last.to(self._model.dtype)):
            best = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
            ids.append(best.indices.to(torch.int32))
            logprobs.append(best.values.to(torch.float16))
        return torch.cat(ids), torch.cat(logprobs)


def record(
    engine: Engine,
    taps: Sequence[int],
    questions: Sequence[str],
    count: int,
    seed: str,
    done: Callable[[], None] = lambda: None,
) -> list[Recorded]:
    """Has the target answer, and keeps what it went through.

    Args:
        engine: Idle, without speculation and without a prefix cache, which would leave gaps.
        taps: Layers whose hidden states are kept.
        questions: Users' turns to draw from; none to have the target make them up.
        count: Conversations.
        seed: Decides everything that is random.
        done: Called after each conversation.
    """  # fmt: skip
    asked = turns(engine, questions, count, random.Random(f"questions {seed}"))
    recorder = Recorder(engine, taps)
    engine.drafters, before = Drafters([recorder]), engine.drafters
    try:
        answers(engine, asked, done)
    finally:
        engine.drafters = before
    return recorder.recorded


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
