"""Log-probabilities as the two endpoints write them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from parlay.server.contract import ServingTokenizer
from parlay.types import SamplingParams, TokenLogprobs

_FLOOR = -9999.0


def _written(logprob: float) -> float:
    """JSON has no infinity and no NaN."""
    return max(logprob, _FLOOR) if math.isfinite(logprob) else _FLOOR


def token_id(token: int) -> str:
    """A token named by its number, as vLLM writes it where `return_tokens_as_token_ids` is asked for."""
    return f"token_id:{token}"


def chat_logprobs(tokenizer: ServingTokenizer, scored: Iterable[TokenLogprobs], ids: bool = False) -> dict[str, Any]:
    """The `logprobs` object of a chat choice; tokens by their text, or by their ids."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_id(token) if ids else tokenizer.token_text(token),
            "logprob": _written(logprob),
            "bytes": tokenizer.token_bytes(token),
        }

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*alternative) for alternative in each.top]}
            for each in scored
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The `logprobs` object of a completion choice, piece by piece: offsets count from the start of its text.

    Tokens are named by their text, or by their ids.
    """

    def __init__(self, tokenizer: ServingTokenizer, params: SamplingParams, ids: bool = False) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self._skip_special_tokens = params.skip_special_tokens
        self._offset = 0

    def piece(self, scored: Iterable[TokenLogprobs], unscored: Iterable[int] = ()) -> dict[str, Any]:
        """The next tokens of the text; those `unscored` come first."""
        piece: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

        def append(token: int, logprob: float | None, top: dict[str, float] | None) -> None:
            piece["text_offset"].append(self._offset)
            piece["token_logprobs"].append(logprob)
            piece["tokens"].append(self._name(token))
            piece["top_logprobs"].append(top)
            self._offset += len(self._tokenizer.token_text(token, self._skip_special_tokens))

        for token in unscored:
            append(token, None, None)
        for each in scored:
            # The chosen token is always among the alternatives, as OpenAI has it.
            top = {self._name(token): _written(logprob) for token, logprob in each.top}
            top.setdefault(self._name(each.token), _written(each.logprob))
            append(each.token, _written(each.logprob), top)
        return piece

    def _name(self, token: int) -> str:
        """The token's text; its bytes where it is a part of a character, so that no two tokens share a name."""
        if self._ids:
            return token_id(token)
        text = self._tokenizer.token_text(token)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token))
