"""What is asked of the server under test: completions of token ids, and scores of the next token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from parlay.bench.client import PATHS, authorisation, connect
from parlay.verify.martingale import WIDE, Scores

NAMED = "token_id:"
# Servers have defaults of their own, which the reference does not know.
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} | dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.0)
PLAIN |= {"repetition_penalty": 1.0}
TIMEOUT = 600  # seconds for one answer


class EndpointError(Exception):
    """The server cannot be tested; the message says what it lacks, or what it said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        tokens: Its token ids.
        stopped: Whether the model ended it, and not the limit.
    """

    tokens: tuple[int, ...]
    stopped: bool


class Endpoint:
    """One model of an OpenAI-compatible server, asked for tokens and not for text.

    Ids come back as vLLM and Parlay return them (`return_token_ids`), or as llama.cpp's server writes them beside
    log-probabilities.

    Args:
        url: Without a path.
        model: Its name there; None takes the first that the server lists.
        api_key: Shown as a bearer token.
        concurrency: Requests in flight at most.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, concurrency: int) -> None:
        self.url, self._model, self._headers = url.rstrip("/").removesuffix("/v1"), model, authorisation(api_key)
        self._client, self._places = connect(concurrency), asyncio.Semaphore(concurrency)

    async def open(self) -> None:
        """Finds out what the model is called.

        Raises:
            EndpointError: when the server cannot be reached or lists none.
        """
        if self._model is None:
            listed = (await self._send("GET", "/v1/models", None)).get("data") or []
            if not listed:
                raise EndpointError(f"{self.url} lists no model; name one with --model")
            self._model = str(listed[0]["id"])

    async def close(self) -> None:
        """Gives connections back."""
        await self._client.aclose()

    async def answer(self, prompt: Sequence[int], **fields: Any) -> Answer:
        """Continues a prompt.

        Args:
            prompt: Token ids.
            fields: Of the request: `max_tokens`, `temperature`, `seed`, `ignore_eos`.
        """
        choice = await self._complete(list(prompt), fields | {"logprobs": 1})
        return Answer(tuple(_ids(choice)), choice.get("finish_reason") == "stop")

    async def scores(self, tokens: Sequence[int]) -> Scores:
        """The next token's distribution, by a request for one token, where there is nothing to guess ahead of."""
        wish = {"max_tokens": 1, "temperature": 1.0, "logprobs": WIDE, "ignore_eos": True}  # as answers are asked for
        choice = await self._complete(list(tokens), wish)
        found = _first_scores(choice.get("logprobs") or {})
        if not found:
            raise EndpointError(f"{self.url} returns no log-probabilities by token id; give --reference-model")
        order = sorted(found, key=lambda token: -found[token])[:WIDE]
        return Scores(np.array(order), np.exp([found[token] for token in order]))

    async def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text as the server reads it."""
        body = {"model": self._model, "prompt": text, "content": text, "add_special": True}
        try:
            return tuple(map(int, (await self._send("POST", "/tokenize", body))["tokens"]))
        except (EndpointError, KeyError, TypeError, ValueError):
            choice = await self._complete(text, {"max_tokens": 1})
        if "prompt_token_ids" not in choice:
            raise EndpointError(f"{self.url} does not say how it reads a prompt; give --reference-model")
        return tuple(choice["prompt_token_ids"])

    async def _complete(self, prompt: str | list[int], fields: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model": self._model, "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = await self._send("POST", PATHS["completions"], body | PLAIN | dict(fields))
        try:
            return dict(answer["choices"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise EndpointError(f"{self.url} answers without choices: {str(answer)[:300]}") from error

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            async with self._places, asyncio.timeout(TIMEOUT):
                response = await self._client.request(method, self.url + path, json=body, headers=self._headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise EndpointError(f"{self.url}{path}: {error or type(error).__name__}") from error
        if not response.is_success:
            raise EndpointError(f"{self.url}{path}: HTTP {response.status_code}: {response.text[:300]}")
        try:
            return response.json()
        except json.JSONDecodeError as error:
            raise EndpointError(f"{self.url}{path}: no JSON ({error})") from error


def _ids(choice: Mapping[str, Any]) -> list[int]:
    """The tokens of a choice, in whichever form the server has them."""
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    scored = choice.get("logprobs") or {}
    entries, names = scored.get("content"), scored.get("tokens")
    if entries is not None and all("id" in entry for entry in entries):
        return [entry["id"] for entry in entries]
    if names is not None and all(name.startswith(NAMED) for name in names):
        return [int(name.removeprefix(NAMED)) for name in names]
    raise EndpointError("the server returns no token ids: neither return_token_ids nor ids beside log-probabilities")


def _first_scores(scored: Mapping[str, Any]) -> dict[int, float]:
    """Log-probabilities of the first token's alternatives, by id; none where they have no ids."""
    if scored.get("content"):
        entries = scored["content"][0].get("top_logprobs") or ()
        return {entry["id"]: entry["logprob"] for entry in entries if "id" in entry}
    tops = (scored.get("top_logprobs") or [None])[0] or {}
    return {int(name.removeprefix(NAMED)): value for name, value in tops.items() if name.startswith(NAMED)}
