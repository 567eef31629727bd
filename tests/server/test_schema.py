from __future__ import annotations

import json
from typing import Any

import pytest

from parlay.server.schema import ChatCompletionRequest, CompletionRequest, parse
from parlay.types import InvalidRequest

USER = [{"role": "user", "content": "hi"}]


def refusal(kind: type[ChatCompletionRequest] | type[CompletionRequest], body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_the_four_forms_of_a_prompt(prompt: Any) -> None:
    assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", [1, "a"], "prompt"),
        ("prompt", [True], "prompt"),
        ("prompt", None, "prompt"),
        ("temperature", "hot", "temperature"),
        ("n", 1.5, "n"),
        ("n", True, "n"),
        ("echo", 1, "echo"),
        ("stop", [1], "stop"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"1": "much"}, "logit_bias"),
        ("speculation", 5, "speculation"),
        ("target_tpot_ms", "fast", "target_tpot_ms"),
        ("verification", "hopeful", "verification"),
        ("suffix", "the end", "suffix"),
        ("tools", [{}], "tools"),
        ("stream_options", {"include_usage": True}, "stream_options"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(field: str, value: Any, param: str) -> None:
    error = refusal(CompletionRequest, {"prompt": "x", field: value})
    assert error.param == param
    assert error.message.startswith(f"{field}: ")
    assert "\n" not in error.message


def test_a_missing_field_is_named() -> None:
    assert refusal(ChatCompletionRequest, {}).message == "messages: is required"
    assert refusal(CompletionRequest, {"model": "x"}).message == "prompt: is required"


def test_places_inside_messages_are_named() -> None:
    robot = refusal(ChatCompletionRequest, {"messages": [*USER, {"role": "robot", "content": ""}]})
    assert robot.param == "messages[1].role"
    number = refusal(ChatCompletionRequest, {"messages": [{"role": "user", "content": 5}]})
    assert number.message == "messages[0].content: must be a string or a list of {type, text} parts"


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "\\ud800"}', b"[1]", b'{"prompt": "x", "top_p": NaN}'])
def test_bodies_that_are_no_json_objects(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(CompletionRequest, body)


def test_unknown_fields_are_refused_with_the_nearest_known_name() -> None:
    error = refusal(CompletionRequest, {"prompt": "x", "temprature": 0})
    assert error.message == "temprature: unknown field; did you mean 'temperature'?"


def test_fields_that_change_nothing_are_accepted() -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "tool_choice": "none"}
    neutral = {"response_format": {"type": "text"}, "suffix": None, "audio": None, "temperature": None, "stop": None}
    parse(ChatCompletionRequest, json.dumps({"messages": USER, **harmless, **neutral}).encode())


def test_openais_client_may_turn_obfuscation_off_but_not_on() -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_obfuscation": False}}
    parse(ChatCompletionRequest, json.dumps(body).encode())
    body["stream_options"] = {"include_obfuscation": True}
    assert refusal(ChatCompletionRequest, body).param == "stream_options.include_obfuscation"


def test_sampling_fields_reach_the_sampling_parameters() -> None:
    written = {
        "n": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7, "stop_token_ids": [4], "ignore_eos": True,
        "min_tokens": 1, "max_tokens": 9, "skip_special_tokens": False, "speculation": "max", "verification": "coupled",
        "target_tpot_ms": 40.0,
    }  # fmt: skip
    body = {"prompt": "x", **written, "stop": "end", "logit_bias": {"5": 1}}
    params = parse(CompletionRequest, json.dumps(body).encode()).sampling_params()
    for name, value in written.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)
    assert params.stop == ("end",)
    assert params.logit_bias == {5: 1.0}


def test_null_stands_for_the_default() -> None:
    body = {"prompt": "x", "temperature": None, "n": None, "max_tokens": None}
    params = parse(CompletionRequest, json.dumps(body).encode()).sampling_params()
    assert (params.temperature, params.n, params.max_tokens) == (1.0, 1, 16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speculation", "some times"),
        ("speculation", "suffix:0"),
        ("speculation", "suffix:999"),
        ("speculation", "suffix:[" + "-1," * 5000 + "-1]"),
        ("target_tpot_ms", 0),
        ("target_tpot_ms", -1),
    ],
)
def test_wishes_out_of_range_are_named(field: str, value: Any) -> None:
    request = parse(CompletionRequest, json.dumps({"prompt": "x", field: value}).encode())
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as caught:
        request.sampling_params()
    assert caught.value.param == field
