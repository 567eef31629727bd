"""Prompts to measure with: a small set of our own, or a file."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

FORMS = (
    '{"category": "...", "prompt": "..."}, or "turns": ["..."], "messages": [{"role": "user", "content": "..."}] '
    'or "conversations": [{"from": "human", "value": "..."}] for "prompt"'
)


class ChatTokenizer(Protocol):
    """Turns a conversation into tokens."""

    def apply_chat_template(self, messages: Iterable[dict[str, Any]]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message, the kind of task it is, and the messages before it."""

    category: str
    text: str
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat APIs and templates take it."""
        return [*map(dict, self.history), {"role": "user", "content": self.text}]


def load_prompts(path: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Reads prompts; categories take turns, so that any beginning of the list is a mix.

    A file has one JSON object a line, or is one JSON list of them. An object has `prompt`, Spec-Bench's `turns`, of
    which the first is taken, `messages` up to the last one of the user, or ShareGPT's `conversations`, of which the
    first human turn is taken and those without one are left out, with a warning.

    Args:
        path: The file; None takes the set that comes with Parlay.
        limit: How many to keep.

    Raises:
        ValueError: naming the line or entry that has none of these forms.
    """
    if path is None:
        name, text = "prompts.jsonl", resources.files("parlay.bench").joinpath("prompts.jsonl").read_text("utf-8")
    else:
        name, text = path.name, path.read_text(encoding="utf-8")
    read = [_prompt(entry, where) for where, entry in _entries(name, text)]
    prompts = list(take_turns(prompt for prompt in read if prompt is not None))
    if not prompts:
        raise ValueError(f"{name}: has no prompts")
    if len(prompts) < len(read):
        logger.warning("%s: left out %d conversations without a human turn", name, len(read) - len(prompts))
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
    """The tokens of each prompt as a conversation."""
    return [tuple(tokenizer.apply_chat_template(prompt.messages)) for prompt in prompts]


def _entries(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Every entry with where it stands, from a list or from lines."""
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{error.lineno}: the list is no JSON ({error.msg})") from None
        yield from ((f"{name}: entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    # Not splitlines(): JSON strings may hold other characters that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{name}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise _unreadable(f"{name}:{number}") from error


def _prompt(entry: Any, where: str) -> Prompt | None:
    """What an entry asks; None for a conversation in which no human asks anything."""
    if not isinstance(entry, dict):
        raise _unreadable(where)
    category = str(entry.get("category", "all"))
    history: Sequence[Mapping[str, Any]] = ()
    try:
        if "prompt" in entry:
            text = entry["prompt"]
        elif "turns" in entry:
            text = entry["turns"][0]
        elif "messages" in entry:
            *history, last = _up_to_the_user(entry["messages"])
            text = last["content"]
        else:
            turns = [turn["value"] for turn in entry["conversations"] if turn["from"] in ("human", "user")]
            if not any(turns[:1]):
                return None
            text = turns[0]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _unreadable(where) from error
    if not isinstance(text, str):
        raise _unreadable(where)
    return Prompt(category, text, tuple(history))


def _up_to_the_user(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The messages without those that answer the user's last one."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    return messages[: last + 1]


def _unreadable(where: str) -> ValueError:
    return ValueError(f"{where}: write {FORMS}")
