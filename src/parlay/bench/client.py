"""One streaming request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from parlay.bench.sse import EventReader
from parlay.bench.workloads import Prompt
from parlay.types import SpeculationStats

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
EXAMPLE = 300  # characters of an error that are kept


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and which of its models and endpoints.

    Attributes:
        url: Without a path.
        model: Its name there.
        endpoint: Messages for `chat`, plain text for `completions`.
        api_key: Sent as a bearer token.
    """

    url: str
    model: str
    endpoint: Endpoint = "chat"
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of every request.

    Attributes:
        max_tokens: Output limit.
        temperature: 0 is greedy.
        ignore_eos: Go on to the limit; an extension, sent only when set.
        speculation: How to bet on it; Parlay's extension, sent only when given.
    """

    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    speculation: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server says it has done; None for what it does not say.

    `methods` are steps by whose guesses they had.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    speculation: SpeculationStats | None
    methods: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no complete answer: a kind to count by, and what was said."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request went. Times are of `time.perf_counter`, in seconds.

    Attributes:
        sent: When it was handed to the connection.
        ended: When the answer was complete, or had failed.
        chunks: When each event with text arrived.
        text: All text, of a failed request too.
        usage: None when the server sent none.
        finish_reason: None when the server gave none.
        failure: None for a complete answer.
    """

    sent: float
    ended: float
    chunks: tuple[float, ...]
    text: str
    usage: Usage | None
    finish_reason: str | None
    failure: Failure | None


class RequestFailed(Exception):
    """Ends a request; carries what is reported."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.failure = Failure(kind, message[:EXAMPLE])


def connect(connections: int | None = None) -> httpx.AsyncClient:
    """A client whose connections are as many as requests may need, and direct: a proxy would be measured too.

    Args:
        connections: At most so many; None sets no limit.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)


def prepare(client: httpx.AsyncClient, target: Target, wish: Wish, prompt: Prompt) -> httpx.Request:
    """The request, complete but for being sent.

    Raises:
        ValueError: for a conversation to the completions endpoint.
    """
    body: dict[str, Any] = {
        "model": target.model,
        **_question(target.endpoint, prompt),
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wish.ignore_eos:
        body["ignore_eos"] = True
    if wish.speculation is not None:
        body["speculation"] = wish.speculation
    # Compressed events would arrive in blocks.
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", **authorisation(target.api_key)}
    return client.build_request("POST", target.url + PATHS[target.endpoint], json=body, headers=headers)


def authorisation(api_key: str | None) -> dict[str, str]:
    """The header that shows the key, if there is one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _question(endpoint: Endpoint, prompt: Prompt) -> dict[str, Any]:
    if endpoint == "chat":
        return {"messages": prompt.messages}
    if prompt.history:
        raise ValueError("endpoint: conversations of several messages need --endpoint chat")
    return {"prompt": prompt.text}


async def ask(client: httpx.AsyncClient, request: httpx.Request, timeout: float) -> Reply:
    """Sends a request and reads its stream to the end; what goes wrong is in the reply.

    Args:
        client: From `connect`.
        request: From `prepare`.
        timeout: Seconds until the answer must be complete.
    """
    answer = _Answer()
    failure: Failure | None = None
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            await _receive(client, request, answer)
    except TimeoutError:
        failure = Failure("timeout", f"no complete answer after {timeout:g} s")
    except RequestFailed as error:
        failure = error.failure
    except httpx.ConnectError as error:
        failure = Failure("no connection", _words(error))
    except httpx.TransportError as error:
        failure = Failure("broken stream" if answer.begun else "no answer", _words(error))
    complete = answer.done is not None  # what the connection does afterwards changes nothing
    return Reply(
        sent=sent,
        ended=answer.done if answer.done is not None else time.perf_counter(),
        chunks=tuple(answer.chunks),
        text="".join(answer.pieces),
        usage=answer.usage,
        finish_reason=answer.finish_reason,
        failure=None if complete else failure,
    )


async def _receive(client: httpx.AsyncClient, request: httpx.Request, answer: _Answer) -> None:
    response = await client.send(request, stream=True)
    try:
        if not response.is_success:
            raise RequestFailed(f"HTTP {response.status_code}", _error_text(await response.aread()))
        answer.begun = True
        reader = EventReader()
        async for piece in response.aiter_bytes():
            now = time.perf_counter()
            for event in reader.feed(piece):
                answer.take(event, now)
    finally:
        await response.aclose()
    if answer.done is None:
        raise RequestFailed("broken stream", "it ended without [DONE]")


class _Answer:
    """What has arrived of an answer."""

    def __init__(self) -> None:
        self.begun = False
        self.done: float | None = None  # when the stream said so
        self.chunks: list[float] = []
        self.pieces: list[str] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None

    def take(self, event: bytes, now: float) -> None:
        """Adds an event.

        Raises:
            RequestFailed: when it reports an error, or cannot be understood.
        """
        if event == b"[DONE]":
            self.done = now
            return
        try:
            chunk = json.loads(event)
            if chunk.get("error"):
                raise RequestFailed("error in stream", _error_text(event))
            for choice in chunk.get("choices") or ():
                self._add(choice, now)
            if chunk.get("usage"):
                self.usage = _usage(chunk["usage"])
        except (ValueError, TypeError, AttributeError):
            raise RequestFailed("unreadable event", event.decode(errors="replace")) from None

    def _add(self, choice: dict[str, Any], now: float) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        # What a model thinks before it answers takes its time too.
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        text = thought + (delta.get("content") or choice.get("text") or "")
        if text:
            self.chunks.append(now)
            self.pieces.append(text)


def _usage(said: dict[str, Any]) -> Usage:
    bets = said.get("speculation") or {}
    spent = {name: bets[name] for name in ("steps", "drafted", "accepted") if isinstance(bets.get(name), int)}
    stats = SpeculationStats(**spent) if len(spent) == 3 else None
    methods = {method: some["steps"] for method, some in (bets.get("methods") or {}).items()}
    return Usage(said.get("prompt_tokens"), said.get("completion_tokens"), stats, methods)


def _error_text(body: bytes) -> str:
    """The message of an error as OpenAI and others write it, else the whole body."""
    text = body.decode(errors="replace").strip()
    try:
        said = json.loads(text)
    except ValueError:
        return text or "(no message)"
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else text


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
