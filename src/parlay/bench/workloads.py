"""Prompts to measure with: a small set of our own, or a file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol


class ChatTokenizer(Protocol):
    """Turns a conversation into tokens."""

    def apply_chat_template(self, messages: Iterable[dict[str, Any]]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message and the kind of task it is."""

    category: str
    text: str


def load_prompts(path: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Reads prompts, one JSON object a line; categories take turns, so that any beginning of the list is a mix.

    A line is `{"category": ..., "prompt": ...}`, or has Spec-Bench's `turns`, of which the first is taken.

    Args:
        path: The file; None takes the set that comes with Parlay.
        limit: How many to keep.

    Raises:
        ValueError: naming the line that has neither form.
    """
    if path is None:
        name, text = "prompts.jsonl", resources.files("parlay.bench").joinpath("prompts.jsonl").read_text("utf-8")
    else:
        name, text = path.name, path.read_text(encoding="utf-8")
    lines = ((number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())
    prompts = list(take_turns(_parse(line, f"{name}:{number}") for number, line in lines))
    if not prompts:
        raise ValueError(f"{name}: has no prompts")
    return prompts[:limit]


def by_category(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts under their categories, both in order of appearance."""
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.category].append(prompt)
    return dict(groups)


def take_turns(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The first prompt of each category, then the second of each, and so on."""
    for group in zip_longest(*by_category(prompts).values()):
        yield from (prompt for prompt in group if prompt is not None)


def encode(prompts: Sequence[Prompt], tokenizer: ChatTokenizer) -> list[tuple[int, ...]]:
    """The tokens of each prompt as the only message of a conversation."""
    return [tuple(tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])) for prompt in prompts]


def _parse(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
        text = entry["prompt"] if "prompt" in entry else entry["turns"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        text = None
        entry = {}
    if not isinstance(text, str):
        raise ValueError(f'{where}: write {{"category": "...", "prompt": "..."}}, or "turns": ["..."] for "prompt"')
    return Prompt(str(entry.get("category", "all")), text)
