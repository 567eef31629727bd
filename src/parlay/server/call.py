"""One HTTP call, understood: its requests to the engine and the form of its answer, in which endpoints differ."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from parlay.server.errors import ApiError
from parlay.server.schema import GenerationRequest
from parlay.types import Delta, InvalidRequest, Request, SamplingParams

MAX_CHOICES = 1024  # of one call, over all its prompts


class AnswerForm(Protocol):
    """How an endpoint writes a choice. A whole choice is one large delta."""

    @property
    def kind(self) -> str:
        """The answer's `object`."""
        ...

    @property
    def chunk_kind(self) -> str:
        """A streamed chunk's `object`."""
        ...

    def choice(self, index: int, whole: Delta) -> dict[str, Any]: ...

    def chunk(self, index: int, delta: Delta, first: bool) -> dict[str, Any]: ...

    def shows(self, delta: Delta) -> bool:
        """Whether a delta holds anything that a stream must pass on."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was understood and tokenised.

    `prompt_only` asks for nothing but the prompt and its scores: `max_tokens` is 0.
    """

    id: str
    created: int
    model: str
    requests: tuple[Request, ...]
    form: AnswerForm
    stream: bool
    include_usage: bool
    prompt_only: bool

    @classmethod
    def prepare(
        cls, id: str, model: str, wish: GenerationRequest, requests: Sequence[Request], form: AnswerForm
    ) -> Call:
        options = wish.stream_options
        return cls(
            id=id,
            created=int(time.time()),
            model=model,
            requests=tuple(requests),
            form=form,
            stream=bool(wish.stream),
            include_usage=bool(options and options.include_usage),
            prompt_only=wish.max_tokens == 0,
        )

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_choices(self) -> int:
        return sum(request.params.n for request in self.requests)

    def first_indices(self) -> Mapping[str, int]:
        """The index of each request's first choice among all choices of the call."""
        return {request.id: number * request.params.n for number, request in enumerate(self.requests)}

    def visible(self, deltas: Sequence[Delta]) -> Sequence[Delta]:
        """What the client gets of these deltas."""
        if not self.prompt_only:
            return deltas
        return [
            Delta(
                delta.request_id,
                delta.choice,
                text="",
                tokens=(),
                prompt_logprobs=delta.prompt_logprobs,
                finish_reason="length" if delta.finish_reason else None,
            )
            for delta in deltas
        ]

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def check_model(asked: str | None, names: Sequence[str]) -> None:
    """Refuses another model than the one served, which may have several names; who asks for none gets that one.

    Raises:
        ApiError: 404, as OpenAI does.
    """
    if asked is not None and asked not in names:
        message = f"model: this server has {' and '.join(map(repr, names))}, not {asked!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")


def new_requests(id: str, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
    """One request per tokenised prompt of the call with this id.

    Raises:
        InvalidRequest: for no prompts, or too many choices.
    """
    if not 1 <= len(prompts) * params.n <= MAX_CHOICES:
        raise InvalidRequest(f"prompt: a call takes 1 to {MAX_CHOICES} choices, n for each prompt", "prompt")
    now = time.perf_counter()
    return [Request(f"{id}-{number}", tuple(prompt), params, now) for number, prompt in enumerate(prompts)]


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
