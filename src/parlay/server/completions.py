"""`POST /v1/completions`: one or many prompts, each continued n times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parlay.server.call import Call, check_model, new_id, new_requests
from parlay.server.contract import ServingEngine, ServingTokenizer
from parlay.server.logprobs import CompletionLogprobs
from parlay.server.schema import CompletionRequest, parse
from parlay.types import Delta, InvalidRequest, Request, SamplingParams


def prepare_completion(body: bytes, engine: ServingEngine, names: Sequence[str]) -> Call:
    """Reads, checks and tokenises a completion call; slow for long prompts, so never on the event loop.

    Raises:
        InvalidRequest: for what the client can put right.
        ApiError: for another model's name.
    """
    wish = parse(CompletionRequest, body)
    check_model(wish.model, names)
    params = _sampling_params(wish)
    prompts = _tokenise(wish, engine.tokenizer)
    id = new_id("cmpl")
    requests = new_requests(id, prompts, params)
    echoed = list(zip(_prompts(wish), requests, strict=True)) if wish.echo else None
    return Call.prepare(id, names[0], wish, requests, CompletionForm(engine.tokenizer, params, wish, requests, echoed))


class CompletionForm:
    """A choice is a text, after its prompt where that is to be echoed."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        tokenizer: ServingTokenizer,
        params: SamplingParams,
        wish: CompletionRequest,
        requests: Sequence[Request],
        echoed: Sequence[tuple[str | list[int], Request]] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._params, self._requests = params, requests
        self._returns_ids, self._names_ids = bool(wish.return_token_ids), bool(wish.return_tokens_as_token_ids)
        self._echoed = echoed  # each prompt as it was written, and its request
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        return self.chunk(index, whole, first=True)

    def chunk(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        unscored, prompt = self._echo(index // self._params.n) if first else ((), "")
        ids: dict[str, Any] = {"token_ids": delta.tokens} if self._returns_ids else {}
        if ids and first:
            ids["prompt_token_ids"] = self._requests[index // self._params.n].prompt
        return {
            "index": index,
            "text": prompt + delta.text,
            "logprobs": self._scored(index, delta, unscored),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **ids,
        }

    def shows(self, delta: Delta) -> bool:
        scored = self._params.logprobs is not None and (delta.logprobs or delta.prompt_logprobs)
        return bool(delta.text or delta.finish_reason or scored or (self._returns_ids and delta.tokens))

    def _echo(self, number: int) -> tuple[Sequence[int], str]:
        """The first token, which nothing predicted, and the text of a prompt that is to be echoed."""
        if self._echoed is None:
            return (), ""
        prompt, request = self._echoed[number]
        if not isinstance(prompt, str):  # tokens that the engine has found to be in its vocabulary
            prompt = self._tokenizer.decode(prompt, skip_special_tokens=self._params.skip_special_tokens)
        return request.prompt[:1], prompt

    def _scored(self, index: int, delta: Delta, unscored: Sequence[int]) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        choice = self._logprobs.setdefault(index, CompletionLogprobs(self._tokenizer, self._params, self._names_ids))
        return choice.piece((*delta.prompt_logprobs, *delta.logprobs), unscored)


def _sampling_params(wish: CompletionRequest) -> SamplingParams:
    if wish.best_of is not None and wish.best_of != (wish.n or 1):
        raise InvalidRequest("best_of: not supported; ask for all choices with n", "best_of")
    if wish.echo and wish.stream and wish.logprobs is not None and (wish.n or 1) > 1:
        # The engine scores a prompt once, with its first choice; the others would have to wait for that.
        raise InvalidRequest("n: must be 1 when a prompt is echoed with logprobs in a stream", "n")
    if wish.max_tokens == 0 and (not wish.echo or wish.min_tokens):
        raise InvalidRequest("max_tokens: must be 1 or more; 0 is for a prompt alone, with echo", "max_tokens")
    # The engine always goes on for a token; the call keeps it to itself.
    read: dict[str, Any] = {} if wish.max_tokens is None else {"max_tokens": wish.max_tokens or 1}
    return wish.sampling_params(logprobs=wish.logprobs, prompt_logprobs=wish.logprobs if wish.echo else None, **read)


def _tokenise(wish: CompletionRequest, tokenizer: ServingTokenizer) -> list[list[int]]:
    special = wish.add_special_tokens is not False
    return [
        tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        for prompt in _prompts(wish)
    ]


def _prompts(wish: CompletionRequest) -> Sequence[str | list[int]]:
    """The prompts one by one, whichever of the four forms they came in."""
    match wish.prompt:
        case str() as text:
            return [text]
        case [int(), *_] as tokens:
            return [[token for token in tokens if isinstance(token, int)]]
        case several:
            return [prompt for prompt in several if not isinstance(prompt, int)]
