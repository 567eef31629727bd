"""Recorded conversations on disk, in files of bounded size, so that training can be broken off and gone on with."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from parlay.drafters.base import Drafters
from parlay.engine.engine import Engine
from parlay.train.conversations import Conversations
from parlay.train.recording import TOP, Recorded, Recorder, load, save

ROUND = 128  # conversations per file
HELD_OUT = 48  # conversations that are never trained on
APART = 8  # of so many given questions one is only for those
ABOUT = "about.json"
LONGEST = 1024  # tokens of a text that are trained on at a time


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a dataset consists of; one that was made otherwise is not gone on with.

    Attributes:
        model: The target, as the user wrote it.
        taps: Layers whose hidden states are kept.
        seed: Decides what is asked, and begins what is sampled.
        prompts: SHA-256 of the prompts that were given; empty where the target made them up.
    """

    model: str
    taps: tuple[int, ...]
    seed: int
    prompts: str


class Dataset:
    """A folder of recorded conversations.

    Args:
        folder: Where they are or will be.
        recipe: What they should consist of; a folder with the states of more layers will do.

    Raises:
        ValueError: when the folder holds something else.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / ABOUT
        wanted = json.loads(json.dumps(asdict(recipe)))
        if not about.exists():
            about.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            return
        found = json.loads(about.read_text(encoding="utf-8"))
        if found | {"taps": wanted["taps"]} != wanted or not set(recipe.taps) <= set(found["taps"]):
            raise ValueError(f"data: {folder} was recorded from {found}, not from {wanted}; name another folder")
        self.recipe = replace(recipe, taps=tuple(found["taps"]))

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.safetensors"

    @property
    def files(self) -> list[Path]:
        """Those to train on."""
        return sorted(self.folder.glob("round-*.safetensors"))

    def read(self, path: Path, taps: Sequence[int]) -> list[Recorded]:
        """The conversations of one file, with the states of some of the layers."""
        columns = [self.recipe.taps.index(tap) for tap in taps]
        return [replace(one, hidden=one.hidden[:, columns]) for one in load(path)]

    def has(self, tokens: int) -> bool:
        """Whether so many are recorded."""
        return self.held_out.exists() and bool(self.files) and sum(map(count_tokens, self.files)) >= tokens

    def fill(
        self,
        engine: Engine,
        questions: Sequence[str],
        tokens: int,
        disk: int,
        deadline: float,
        advance: Callable[[int], None],
    ) -> None:
        """Records until there is enough, the disk budget is used up or time is over; at least one file.

        Args:
            engine: Idle, of `recording_engine` with the recipe's taps; runs the target.
            questions: Users' turns to draw from, the first of every eight for what is held out; none to have the target
                make them up.
            tokens: How many to have.
            disk: Bytes to stay below.
            deadline: On the clock of `time.monotonic`.
            advance: Called with the number of tokens that came to be there.
        """
        recorder = engine.drafters.by_name[Recorder.name]
        assert isinstance(recorder, Recorder)
        apart = questions[::APART]  # what drafters are judged by must not be among what they learn
        questions = [question for number, question in enumerate(questions) if number % APART] or questions
        if not self.held_out.exists():
            held_out = Conversations(engine, apart, f"{self.recipe.seed} held out", HELD_OUT)
            save(self.held_out, _recorded(recorder, held_out, HELD_OUT))
        have, conversations = 0, None
        for number in range(1 << 20):
            path = self.folder / f"round-{number:05d}.safetensors"
            if not path.exists():
                sizes = [file.stat().st_size for file in self.files]
                full = sum(sizes) + max(sizes, default=0) + self.held_out.stat().st_size > disk
                if sizes and (have >= tokens or full or time.monotonic() > deadline):
                    break
                conversations = conversations or Conversations(engine, questions, f"{self.recipe.seed} {number}")
                save(path, _recorded(recorder, conversations, ROUND))
            found = count_tokens(path)
            have += found
            advance(found)
        engine.drafters = Drafters([])
        if conversations:
            conversations.stop()


def _recorded(recorder: Recorder, conversations: Conversations, count: int) -> list[Recorded]:
    conversations.run(count - len(recorder.found))
    if len(recorder.found) < count:  # an engine goes on without a drafter that fails
        raise RuntimeError("recording failed; the log says why")
    found, recorder.found[:] = recorder.found[:count], recorder.found[count:]
    return found


def count_tokens(path: Path) -> int:
    """Tokens in a file, without reading it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return int(file.get_slice("tokens").get_shape()[0])


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Texts, or parts of them, side by side.

    Attributes:
        tokens: [B, T], padded with 0.
        hidden: [B, T, taps, hidden] in float32.
        ids: [B, T, TOP] the most likely next tokens.
        probs: [B, T, TOP] and their probabilities; 0 in the padding.
        answer: [B, T] where a token of an answer comes next.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    answer: torch.Tensor

    @property
    def count(self) -> int:
        """Places that are no padding."""
        return int((self.probs[..., 0] > 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same in another memory."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def batches(texts: Sequence[Recorded], size: int, chance: random.Random | None) -> Iterator[Batch]:
    """All texts in batches of about `size` tokens, alike in length; in random order where there is chance."""
    groups = _groups(texts, size)
    if chance:
        chance.shuffle(groups)
    yield from map(_batch, groups)


def count_batches(texts: Sequence[Recorded], size: int) -> int:
    """How many of them there are."""
    return len(_groups(texts, size))


def _groups(texts: Sequence[Recorded], size: int) -> list[list[tuple[Recorded, int]]]:
    """Texts and where in them to begin, by batch."""
    parts = [(text, at) for text in texts for at in range(0, len(text), LONGEST) if len(text) - at > 1]
    parts.sort(key=lambda part: min(LONGEST, len(part[0]) - part[1]))
    groups: list[list[tuple[Recorded, int]]] = [[]]
    for text, at in parts:
        if len(groups[-1]) * min(LONGEST, len(text) - at) >= size:
            groups.append([])
        groups[-1].append((text, at))
    return [group for group in groups if group]


def _batch(parts: Sequence[tuple[Recorded, int]]) -> Batch:
    lengths = [min(LONGEST, len(text) - at) for text, at in parts]
    shape = len(parts), max(lengths)
    _, taps, width = parts[0][0].hidden.shape
    top = parts[0][0].ids.shape[-1]
    assert top <= TOP
    batch = Batch(
        torch.zeros(shape, dtype=torch.long, device="cpu"),
        torch.zeros(*shape, taps, width, device="cpu"),
        torch.zeros(*shape, top, dtype=torch.long, device="cpu"),
        torch.zeros(*shape, top, device="cpu"),
        torch.zeros(shape, dtype=torch.bool, device="cpu"),
    )
    for line, ((text, at), count) in enumerate(zip(parts, lengths, strict=True)):
        batch.tokens[line, :count] = text.tokens[at : at + count]
        batch.hidden[line, :count] = text.hidden[at : at + count]
        batch.ids[line, :count] = text.ids[at : at + count]
        batch.probs[line, :count] = text.logprobs[at : at + count].float().exp()
        batch.answer[line, max(0, text.start - 1 - at) : count] = True
    return batch
