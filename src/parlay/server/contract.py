"""What the server asks of an engine and its tokenizer; `parlay.engine.engine.Engine` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from parlay.types import Delta, EngineStatus, Request


class ServingTokenizer(Protocol):
    """Text to tokens and back; used from several threads."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[int]: ...

    def token_text(self, token: int, skip_special_tokens: bool = False) -> str: ...

    def token_bytes(self, token: int) -> list[int]: ...


class ServingEngine(Protocol):
    """Takes requests and turns them into deltas, one step at a time; used from one thread only.

    `status` is called after every step, so it must be cheap. `use_policy` raises `InvalidRequest` for an unknown name.
    """

    @property
    def tokenizer(self) -> ServingTokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Delta]: ...

    @property
    def policy_name(self) -> str: ...

    def use_policy(self, name: str) -> None: ...

    def forget_answers(self) -> None: ...

    def status(self) -> EngineStatus: ...
