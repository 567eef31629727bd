"""An engine that repeats its prompt, one token a step, and fails or waits on demand, as no real engine would."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from parlay.types import Delta, EngineStatus, InvalidRequest, Request, SpeculationStats, TokenLogprobs


class ByteTokenizer:
    """One token per byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))

    def token_text(self, token: int, skip_special_tokens: bool = False) -> str:
        return self.decode([token])

    def token_bytes(self, token: int) -> list[int]:
        return [token]


class StandIn:
    """Steps freely, or one step per `pace.release()` when paced."""

    max_model_len = 200
    slots = 4
    queued = 0.25  # seconds that every choice says it waited

    def __init__(self, *, paced: bool = False) -> None:
        self.tokenizer = ByteTokenizer()
        self.live: dict[str, tuple[Request, int]] = {}
        self.aborted: set[str] = set()
        self.pace = threading.Semaphore(0) if paced else None
        self.breaks: Exception | None = None  # raised by the next step
        self.breaks_on_add: Exception | None = None  # raised by the next add
        self.threads: set[str] = set()
        self.policy_name = "parrot"

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> None:
        self.threads.add(threading.current_thread().name)
        if self.breaks_on_add is not None:
            error, self.breaks_on_add = self.breaks_on_add, None
            raise error
        if len(request.prompt) + 1 > self.max_model_len:
            raise InvalidRequest(f"prompt: longer than the context of {self.max_model_len} tokens", "prompt")
        self.live[request.id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.current_thread().name)
        if self.live.pop(request_id, None) is not None:
            self.aborted.add(request_id)

    def step(self) -> list[Delta]:
        self.threads.add(threading.current_thread().name)
        # Not for ever, so that an abort is seen even when nobody lets the next step pass.
        if self.pace is not None and not self.pace.acquire(timeout=0.01):
            return []
        if self.breaks is not None:
            raise self.breaks
        return [delta for request, done in list(self.live.values()) for delta in self._advance(request, done)]

    def forget_answers(self) -> None:
        """It remembers none."""

    def use_policy(self, name: str) -> None:
        if name == "none":
            raise InvalidRequest("policy: there is none", "policy")
        self.policy_name = name

    def status(self) -> EngineStatus:
        choices = sum(request.params.n for request, _ in list(self.live.values()))
        running = min(choices, self.slots)
        return EngineStatus(self.slots, running, choices - running, kv_usage=running / self.slots)

    def _advance(self, request: Request, done: int) -> list[Delta]:
        limit = request.params.max_tokens or self.max_model_len - len(request.prompt)
        token = request.prompt[done % len(request.prompt)]
        last = done + 1 == limit
        if last:
            del self.live[request.id]
        else:
            self.live[request.id] = (request, done + 1)
        scores = request.params.logprobs is not None
        scores_prompt = request.params.prompt_logprobs is not None and done == 0
        return [
            Delta(
                request.id,
                choice,
                text=self.tokenizer.decode([token]),
                tokens=(token,),
                logprobs=(TokenLogprobs(token, -0.5, ((token, -0.5), (0, float("-inf")))),) if scores else (),
                prompt_logprobs=tuple(TokenLogprobs(each, -1.0) for each in request.prompt[1:])
                if scores_prompt and choice == 0
                else (),
                finish_reason="length" if last else None,
                stats=SpeculationStats(steps=1, drafted=3, accepted=2),
                method="parrot",
                queued=self.queued,
            )
            for choice in range(request.params.n)
        ]
