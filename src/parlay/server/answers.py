"""From deltas to answers: one JSON object when all is done, or server-sent events as it happens."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from parlay.server.call import Call
from parlay.server.errors import as_api_error
from parlay.server.worker import EngineFailed, Generation
from parlay.types import Delta, SpeculationStats

DONE = b"data: [DONE]\n\n"


class Usage:
    """What a call has cost so far."""

    def __init__(self, call: Call) -> None:
        self._num_prompt_tokens = call.num_prompt_tokens
        self._num_completion_tokens = 0
        self._stats = SpeculationStats()
        self._methods: defaultdict[str, SpeculationStats] = defaultdict(SpeculationStats)

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self._num_completion_tokens += len(delta.tokens)
            self._stats += delta.stats
            if delta.method is not None:
                self._methods[delta.method] += delta.stats

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "speculation": {
                **asdict(self._stats),
                "methods": {method: asdict(stats) for method, stats in self._methods.items()},
            },
        }


async def whole_answer(call: Call, generation: Generation) -> bytes:
    """The JSON answer to a call that does not stream.

    Raises:
        EngineFailed: when it cannot be finished.
    """
    usage = Usage(call)
    arrived: dict[tuple[str, int], list[Delta]] = {
        (request.id, choice): [] for request in call.requests for choice in range(request.params.n)
    }
    async for gained in generation:
        deltas = call.visible(gained)
        usage.add(deltas)
        for delta in deltas:
            arrived[delta.request_id, delta.choice].append(delta)

    def write() -> bytes:
        choices: list[dict[str, Any]] = []
        prompt_logprobs = ()
        for (_, choice), deltas in arrived.items():
            whole = join(deltas)
            # A prompt is scored once, with the first of its choices.
            prompt_logprobs = whole.prompt_logprobs if choice == 0 else prompt_logprobs
            choices.append(call.form.choice(len(choices), replace(whole, prompt_logprobs=prompt_logprobs)))
        return _json({**call.envelope(call.form.kind, choices), "usage": usage.body()})

    return await asyncio.to_thread(write)  # long when a long prompt was scored


async def event_stream(call: Call, generation: Generation) -> AsyncIterator[bytes]:
    """The answer as server-sent events, those of one engine step at a time."""
    usage = Usage(call)
    first_indices = call.first_indices()
    begun: set[int] = set()
    # With include_usage every chunk has the key, as OpenAI has it, and the last one the value.
    tail: dict[str, Any] = {"usage": None} if call.include_usage else {}

    def write(deltas: Sequence[Delta]) -> bytes:
        events: list[bytes] = []
        for delta in filter(call.form.shows, deltas):
            index = first_indices[delta.request_id] + delta.choice
            chunk = call.form.chunk(index, delta, first=index not in begun)
            begun.add(index)
            events.append(_event({**call.envelope(call.form.chunk_kind, [chunk]), **tail}))
        return b"".join(events)

    try:
        async for gained in generation:
            deltas = call.visible(gained)
            usage.add(deltas)
            many = any(delta.prompt_logprobs for delta in deltas)  # scores of a whole chunk of prompt
            if events := await asyncio.to_thread(write, deltas) if many else write(deltas):
                yield events
    except EngineFailed as failure:
        yield _event(as_api_error(failure).body())  # and no [DONE]: this answer is not complete
        return
    if call.include_usage:
        yield _event({**call.envelope(call.form.chunk_kind, []), "usage": usage.body()})
    yield DONE


class EventStream(StreamingResponse):
    """Sends an event stream, and frees its generation however that ends, begun or not."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, generation: Generation) -> None:
        super().__init__(
            event_stream(call, generation), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def join(deltas: Sequence[Delta]) -> Delta:
    """All deltas of one choice as a single one."""
    last = deltas[-1]
    return Delta(
        request_id=last.request_id,
        choice=last.choice,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=tuple(scored for delta in deltas for scored in delta.logprobs),
        prompt_logprobs=tuple(scored for delta in deltas for scored in delta.prompt_logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + _json(data) + b"\n\n"


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
