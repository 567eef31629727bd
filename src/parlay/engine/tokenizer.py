"""Text to tokens and back, safely from several threads."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from parlay.types import InvalidRequest


class Tokenizer:
    """A Hugging Face tokenizer for many threads: encoding is locked, decoding works on a copy of its own.

    (The library's encoder changes settings while it works, which another thread must not meet.)

    Args:
        tokenizer: The library's object.
        max_model_len: Texts that cannot fit are refused before they are encoded, which would hold up everybody else.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._encoder = tokenizer
        self._longest_text = max_model_len * max(map(len, tokenizer.get_vocab()))
        self._decoder = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    @property
    def eos_token_id(self) -> int | None:
        return self._encoder.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            InvalidRequest: when it is longer than any text within the context.
        """
        if len(text) > self._longest_text:
            raise InvalidRequest(
                f"prompt: {len(text)} characters cannot fit in the context; shorten it to at most {self._longest_text}",
                "prompt",
                "context_length_exceeded",
            )
        with self._lock:
            return self._encoder.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._decoder.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def apply_chat_template(self, messages: Iterable[dict[str, Any]], **options: Any) -> list[int]:
        """Tokens of a conversation, with the opening of the assistant's turn.

        Raises:
            InvalidRequest: when the model has no chat template, the template refuses the messages, or they cannot fit.
        """
        if not self._encoder.chat_template:
            raise InvalidRequest("messages: this model has no chat template; use /v1/completions", "messages")
        options = {"add_generation_prompt": True} | options
        try:
            with self._lock:
                text = self._encoder.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # templates are programs of the model's author and may raise anything
            raise InvalidRequest(f"messages: the model's chat template refused them ({error})", "messages") from error
        return self.encode(text, add_special_tokens=False)  # templates write the special tokens themselves

    def token_text(self, token: int, skip_special_tokens: bool = False) -> str:
        """What one token looks like inside a text; broken characters where it is part of one."""
        # At the beginning of a text, many tokenizers would drop the space that a token starts with.
        ids, text = self._anchor
        both = self.decode([*ids, token], skip_special_tokens)
        return both[len(text) :] if both.startswith(text) else self.decode([token], skip_special_tokens)

    def token_bytes(self, token: int) -> list[int]:
        """The UTF-8 bytes that one token stands for, also where they are only part of a character."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        piece = self._decoder.convert_ids_to_tokens(token) or ""
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return [int(found[1], 16)]
        if all(character in self._byte_of for character in piece):
            return [self._byte_of[character] for character in piece]
        return list(text.encode())

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Tokens to put in front of another one, and their text."""
        ids = self.encode("a", add_special_tokens=False)
        return ids, self.decode(ids)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Byte-level BPE writes every byte as one printable character: itself where printable, else from 256 up."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
