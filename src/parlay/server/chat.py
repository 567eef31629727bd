"""`POST /v1/chat/completions`: messages in, assistant messages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parlay.server.call import Call, check_model, new_id, new_requests
from parlay.server.contract import ServingEngine, ServingTokenizer
from parlay.server.logprobs import chat_logprobs
from parlay.server.schema import ChatCompletionRequest, ChatMessage, parse
from parlay.types import Delta, InvalidRequest, SamplingParams

# Arguments of the tokenizer's method itself; everything else is the template's.
_TOKENIZER_OPTIONS = frozenset((
    "self", "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
))  # fmt: skip


def prepare_chat(body: bytes, engine: ServingEngine, names: Sequence[str]) -> Call:
    """Reads, checks and tokenises a chat call; slow for long prompts, so never on the event loop.

    Raises:
        InvalidRequest: for what the client can put right.
        ApiError: for another model's name.
    """
    wish = parse(ChatCompletionRequest, body)
    check_model(wish.model, names)
    params = _sampling_params(wish)
    messages = [_template_message(message, f"messages[{number}]") for number, message in enumerate(wish.messages)]
    prompt = engine.tokenizer.apply_chat_template(messages, **_template_options(wish))
    id = new_id("chatcmpl")
    form = ChatForm(
        engine.tokenizer,
        logprobs=params.logprobs is not None,
        prompt=tuple(prompt) if wish.return_token_ids else None,
        names_ids=bool(wish.return_tokens_as_token_ids),
    )
    return Call.prepare(id, names[0], wish, new_requests(id, [prompt], params), form)


@dataclass(frozen=True, slots=True)
class ChatForm:
    """A choice is a message.

    Attributes:
        tokenizer: The engine's.
        logprobs: Whether tokens are scored.
        prompt: The prompt's tokens where ids are to be returned.
        names_ids: Whether scored tokens are named by their ids.
    """

    tokenizer: ServingTokenizer
    logprobs: bool
    prompt: tuple[int, ...] | None
    names_ids: bool
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(whole, first=True)}

    def chunk(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        gained: dict[str, Any] = {"role": "assistant"} if first else {}
        if delta.text or first:
            gained["content"] = delta.text
        return {"index": index, "delta": gained, **self._rest(delta, first)}

    def shows(self, delta: Delta) -> bool:
        wanted = (self.logprobs and delta.logprobs) or (self.prompt is not None and delta.tokens)
        return bool(delta.text or delta.finish_reason or wanted)

    def _rest(self, delta: Delta, first: bool) -> dict[str, Any]:
        known = self.logprobs and delta.logprobs
        scored = chat_logprobs(self.tokenizer, delta.logprobs, self.names_ids) if known else None
        ids: dict[str, Any] = {} if self.prompt is None else {"token_ids": delta.tokens}
        if self.prompt is not None and first:
            ids["prompt_token_ids"] = self.prompt
        return {"logprobs": scored, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason, **ids}


def _sampling_params(wish: ChatCompletionRequest) -> SamplingParams:
    limits = {limit for limit in (wish.max_tokens, wish.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidRequest("max_completion_tokens: differs from max_tokens; give one", "max_completion_tokens")
    if wish.top_logprobs is not None and not wish.logprobs:
        raise InvalidRequest("top_logprobs: only allowed when logprobs is true", "top_logprobs")
    return wish.sampling_params(
        max_tokens=next(iter(limits), None),
        logprobs=(wish.top_logprobs or 0) if wish.logprobs else None,
    )


def _template_message(message: ChatMessage, where: str) -> dict[str, Any]:
    """The message as chat templates expect it: one string of content, and no keys without a value."""
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                path = f"{where}.content[{number}]"
                raise InvalidRequest(f"{path}: only parts of type 'text' are served, not {part.type!r}", path)
        content = "\n".join(part.text or "" for part in content)
    rest = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if content is None and "tool_calls" not in rest:
        raise InvalidRequest(f"{where}.content: is required", f"{where}.content")
    # "developer" is OpenAI's newer word for what every template calls "system".
    role = "system" if message.role == "developer" else message.role
    return {**rest, "role": role, "content": content or ""}


def _template_options(wish: ChatCompletionRequest) -> dict[str, Any]:
    options = wish.chat_template_kwargs or {}
    if taken := sorted(_TOKENIZER_OPTIONS & options.keys()):
        raise InvalidRequest(f"chat_template_kwargs: {taken[0]} is not for clients to set", "chat_template_kwargs")
    return options
