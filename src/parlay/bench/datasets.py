"""Which prompts a load consists of: drawn from a set by a seed, or made up at a length."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from parlay.bench.workloads import Prompt, load_prompts

SYNTHETIC_WORDS = 256


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Prompts of random words.

    Attributes:
        words: Of every prompt. Without the server's tokenizer words are counted; a common word is about one token.
        output: Tokens to ask for; None leaves that to the caller.
    """

    words: int = SYNTHETIC_WORDS
    output: int | None = None


Dataset = Path | Synthetic | None  # None is the set that comes with Parlay


def parse_dataset(text: str | None) -> Dataset:
    """Reads a file's name, `synthetic`, `synthetic:INPUT` or `synthetic:INPUT,OUTPUT`.

    Raises:
        ValueError: when what follows `synthetic:` is no length.
    """
    if text is None:
        return None
    if not re.match(r"synthetic(:|$)", text):
        return Path(text)
    form = re.fullmatch(r"synthetic(:([1-9]\d*)(,([1-9]\d*))?)?", text)
    if form is None:
        raise ValueError(f"dataset {text!r}: write synthetic or synthetic:INPUT,OUTPUT, as synthetic:256,128")
    return Synthetic(int(form[2] or SYNTHETIC_WORDS), int(form[4]) if form[4] else None)


def draw(dataset: Dataset, count: int, seed: int) -> list[Prompt]:
    """So many prompts, the same for the same seed; a set that is smaller starts over.

    Args:
        dataset: Where from.
        count: How many.
        seed: Shuffles a set, or chooses the words.

    Raises:
        ValueError: when the file has an entry that cannot be read.
        OSError: when there is no such file.
    """
    chance = random.Random(f"prompts {seed}")
    if isinstance(dataset, Synthetic):
        vocabulary = _vocabulary()
        return [_synthetic(vocabulary, dataset.words, chance) for _ in range(count)]
    prompts = load_prompts(dataset)
    chance.shuffle(prompts)
    return list(islice(cycle(prompts), count))


def _synthetic(vocabulary: Sequence[str], words: int, chance: random.Random) -> Prompt:
    """Random from the first word on, so that no prompt shares a beginning that a server could have cached."""
    return Prompt("synthetic", " ".join(chance.choices(vocabulary, k=words)))


def _vocabulary() -> list[str]:
    """Common words: those of Parlay's own prompts."""
    return sorted({word for prompt in load_prompts() for word in re.findall(r"\b[a-z]{2,8}\b", prompt.text)})
