"""Whatever JSON comes in: an answer or an error in OpenAI's shape, never a failure of the server's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parlay.engine.engine import Engine
from parlay.server.schema import ChatCompletionRequest, CompletionRequest
from tests.serving import Server, until

FIELDS = {
    "/v1/completions": set(CompletionRequest.model_fields),
    "/v1/chat/completions": set(ChatCompletionRequest.model_fields),
}
# What makes a call slow is kept out: the many tokens of a good call are other tests' matter.
SLOW = {"max_tokens", "max_completion_tokens", "n", "min_tokens"}

text = st.text(max_size=12)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from((2**31, 2**63, -(2**63) - 1, 10**400, 1e-300, 1e308, -1e308, 0.5, 1e-5, 301, 302)),
    st.floats(allow_nan=True, allow_infinity=True),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, text, st.sampled_from(("off", "max", "optimal", "coupled")))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool", "robot")) | junk, "content": text | junk},
        optional={"name": junk, "tool_calls": junk, "tool_call_id": junk},
    ),
    max_size=3,
)
likely = {
    "messages": messages,
    "prompt": st.one_of(text, st.lists(text, max_size=3), st.lists(numbers, max_size=4), st.lists(st.lists(numbers))),
    "stop": st.lists(text, max_size=3) | text,
    "stop_token_ids": st.lists(numbers, max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 303).map(str) | text, numbers, max_size=3),
    "stream_options": st.dictionaries(st.sampled_from(("include_usage", "include_obfuscation", "x")), st.booleans()),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(("add_generation_prompt", "continue_final_message", "messages", "enable_thinking")), junk
    ),
}


def bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A call that is fine but for a few fields."""
    fine: dict[str, Any] = {"messages": [{"role": "user", "content": "the and"}]}
    if path == "/v1/completions":
        fine = {"prompt": "the and"}
    odd = {name: likely.get(name, scalars) | junk for name in FIELDS[path] - SLOW}
    odd |= {name: st.integers(-1, 3) | text for name in SLOW}
    some = st.sets(st.sampled_from(sorted(odd)), max_size=4).flatmap(
        lambda names: st.fixed_dictionaries({name: odd[name] for name in names})
    )
    unknown = st.dictionaries(text, junk, max_size=1)
    return st.builds(lambda a, b: {**fine, "max_tokens": 2, **b, **a}, some, unknown)


@pytest.mark.parametrize("path", FIELDS)
def test_any_json_gets_an_answer_or_openais_error(server: Server, engine: Engine, path: str) -> None:
    with server.http() as http:

        @settings(max_examples=150, deadline=None, suppress_health_check=(HealthCheck.too_slow,))
        @given(bodies(path) | junk)
        def send(body: Any) -> None:
            answer = http.post(path, content=json.dumps(body).encode())
            if answer.status_code == 200:
                assert answer.headers["content-type"].startswith(("application/json", "text/event-stream"))
                assert b'"error"' not in answer.content
                return
            assert answer.status_code in (400, 404), answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert error["message"]

        send()
        until(lambda: not engine.has_work)
        engine.check_integrity()
        good = http.post("/v1/completions", json={"prompt": "the and", "max_tokens": 3, "ignore_eos": True})
        assert good.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("body", [b"[" * 10_000, b"\xff\xfe", b'{"prompt":"\\ud800"}', b"null", b'"x"', b"1e999"])
@pytest.mark.parametrize("path", FIELDS)
def test_bodies_that_json_cannot_be_read_from(server: Server, path: str, body: bytes) -> None:
    with server.http() as http:
        answer = http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("token", [-1, 2**31, 2**63, 2**70])
def test_echoed_tokens_that_do_not_exist_are_named(server: Server, token: int) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": [token], "echo": True, "logprobs": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_a_top_k_beyond_any_integer_type_keeps_all(server: Server) -> None:
    body = {"prompt": "the and", "temperature": 1, "top_k": 2**64, "max_tokens": 2, "ignore_eos": True}
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2
