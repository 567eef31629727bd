"""Request bodies of the OpenAI API, with vLLM's sampling fields and Parlay's three.

A field is served, or known to change nothing, or refused by name: nothing that a client asked for is lost silently.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parlay.types import InvalidRequest, SamplingParams

# A list of a million token ids is not a list of strings: one wrong item says so.
_FAIL_FAST = Field(fail_fast=True)

# Fields that never change the answer.
_HARMLESS = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
))  # fmt: skip

# Fields that would change the answer, with the values (beside null) that ask for what Parlay does anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "moderation": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "structured_outputs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
}

# What unions of types accept, in words: pydantic reports one error per member.
_FORMS = {
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "must be a string or a list of strings",
    "content": "must be a string or a list of {type, text} parts",
    "logit_bias": "must map token ids to numbers",
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream says beside the text."""

    include_usage: bool | None = None


class ContentPart(_Body):
    """One part of a message; only text is served."""

    type: str
    text: str | None = None


class ChatMessage(_Body):
    """One turn of the conversation; other keys, such as `tool_call_id`, go to the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], _FAIL_FAST] | None = None


class GenerationRequest(_Body):
    """What both endpoints share. Null stands for the default everywhere, as OpenAI's clients expect."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], _FAIL_FAST] | None = None
    stop_token_ids: Annotated[list[int], _FAIL_FAST] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    skip_special_tokens: bool | None = None
    speculation: str | None = None
    target_tpot_ms: float | None = None
    verification: Literal["optimal", "coupled"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def sampling_params(self, **read: Any) -> SamplingParams:
        """The sampling parameters as written, with `read` for the fields whose meaning depends on the endpoint.

        Raises:
            InvalidRequest: when a value is out of range.
        """
        written = {name: value for name in _AS_WRITTEN if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**written, **read})


_AS_WRITTEN = tuple(name for name in GenerationRequest.model_fields if name in SamplingParams.__slots__)


class ChatCompletionRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], _FAIL_FAST]
        | Annotated[list[int], _FAIL_FAST]
        | Annotated[list[Annotated[list[int], _FAIL_FAST]], _FAIL_FAST]
    )
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class PolicyRequest(_Body):
    """The body of `POST /admin/policy`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    policy: str


Body = TypeVar("Body", bound=GenerationRequest)

_FIELDS = frozenset(
    name
    for model in (StreamOptions, ContentPart, ChatMessage, ChatCompletionRequest, CompletionRequest, PolicyRequest)
    for name in model.model_fields
)


def parse(kind: type[Body], body: bytes) -> Body:
    """Reads a request body.

    Raises:
        InvalidRequest: naming the first field that is wrong, unsupported or unknown.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    _refuse_unserved(request)
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest("stream_options: only allowed when stream is true", "stream_options")
        _refuse_extra_stream_options(request.stream_options)
    return request


def parse_policy(body: bytes) -> str:
    """Reads the body of `POST /admin/policy`.

    Raises:
        InvalidRequest: when it is no `{"policy": NAME}`.
    """
    try:
        return PolicyRequest.model_validate_json(body).policy
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].replace("Input should be", "must be").replace("Field required", "is required")
    if first["type"] == "json_invalid":
        return InvalidRequest(message.replace("Invalid JSON:", "the body is not valid JSON:"))
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        return InvalidRequest(f"{name}: unknown field; leave it out", name)
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object")
    path = field = ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _FIELDS:
            field = part
            path += f".{part}" if path else part
        else:  # the name of a union's member, or a key that the client chose
            message = _FORMS.get(field, message)
            break
    return InvalidRequest(f"{path}: {message[0].lower()}{message[1:]}", path)


def _refuse_unserved(request: GenerationRequest) -> None:
    for name, value in (request.model_extra or {}).items():
        if name in _HARMLESS or (value is None and name in _UNSUPPORTED):
            continue
        if name not in _UNSUPPORTED:
            raise InvalidRequest(f"{name}: unknown field{_nearest(name, type(request))}", name)
        if value not in _UNSUPPORTED[name]:
            raise InvalidRequest(f"{name}: not supported by this server; leave it out", name)


def _refuse_extra_stream_options(options: StreamOptions) -> None:
    for name, value in (options.model_extra or {}).items():
        if value:  # OpenAI's client writes `include_obfuscation: false`
            raise InvalidRequest(f"stream_options.{name}: not supported by this server", f"stream_options.{name}")


def _nearest(name: str, kind: type[GenerationRequest]) -> str:
    near = difflib.get_close_matches(name, kind.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
