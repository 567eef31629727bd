"""What users of OpenAI's client meet, with a real engine on a real port."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from parlay.engine.engine import Engine
from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, serving, until
from tests.tiny import END, VOCAB_SIZE

MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the and the and the"}]
LONG: dict[str, Any] = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}


def free_pages(engine: Engine) -> int:
    return engine.scheduler.blocks.num_free


def test_models(client: openai.OpenAI, engine: Engine) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.model_extra == {"max_model_len": engine.max_model_len}
    assert client.models.retrieve(MODEL) == card


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, **LONG)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_usage_tells_what_speculation_did(client: openai.OpenAI) -> None:
    def speculation(wish: str) -> dict[str, Any]:
        body = {"ignore_eos": True, "speculation": wish, "logit_bias": {str(END): -100}}
        prompt = "the and " * 8
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0, extra_body=body)
        assert answer.usage is not None
        return (answer.usage.model_extra or {})["speculation"]

    assert speculation("off") == {"steps": 16, "drafted": 0, "accepted": 0, "methods": {}}
    for wish in ("max", "suffix:2"):
        bet = speculation(wish)
        if wish == "max":  # whether it pays is the policy's to say
            assert bet["steps"] + bet["accepted"] == 16
            continue
        assert bet["drafted"] > 0
        assert bet["steps"] + bet["accepted"] == 16
        (method,) = bet["methods"].values()
        assert 0 < method.pop("steps") <= bet["steps"]
        assert method == {"drafted": bet["drafted"], "accepted": bet["accepted"]}
        assert bet["drafted"] <= 2 * bet["steps"]


def test_a_bet_on_nobody_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"no drafter 'medusa' here: .* bet on suffix"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"speculation": "medusa:3"})


@pytest.mark.parametrize("wish", ["off", "suffix:3"])
def test_the_usage_of_a_stream_tells_it_too(client: openai.OpenAI, engine: Engine, wish: str) -> None:
    (token,) = engine.tokenizer.encode(" of")
    call: dict[str, Any] = {"model": MODEL, "prompt": "the and", "max_tokens": 16, "logit_bias": {str(token): 100}}
    *chunks, last = client.completions.create(
        **call, stream=True, stream_options={"include_usage": True}, extra_body={"speculation": wish}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    said = (last.usage.model_extra or {})["speculation"]
    assert said["steps"] + said["accepted"] == last.usage.completion_tokens == 16
    assert (said["drafted"] > 0) == (said["accepted"] > 0) == (wish != "off")


def test_chat_goes_up_to_the_context_limit(client: openai.OpenAI, engine: Engine) -> None:
    body = {"ignore_eos": True}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, extra_body=body)
    assert answer.usage is not None
    assert answer.usage.total_tokens == engine.max_model_len


def test_completions_default_to_16_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="the", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_messages_of_parts_and_developers(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "the and"}, {"type": "text", "text": "the and"}]
    messages: Any = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    joined: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the and\nthe and"}]
    one, other = (
        client.chat.completions.create(model=MODEL, messages=each, temperature=0, **LONG).choices[0].message.content
        for each in (messages, joined)
    )
    assert one == other


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 11, "n": 3}])
def test_a_chat_stream_says_what_the_whole_answer_says(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    call = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **sampling, **LONG}
    whole = client.chat.completions.create(**call)
    texts = [""] * len(whole.choices)
    scores: list[list[Any]] = [[] for _ in whole.choices]
    endings: list[str | None] = [None] * len(whole.choices)
    roles: list[str] = []
    usage = None
    for chunk in client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            scores[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            endings[choice.index] = choice.finish_reason
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    for choice, streamed in zip(whole.choices, scores, strict=True):
        assert choice.logprobs is not None
        expected = choice.logprobs.content or []
        assert [each.token for each in streamed] == [each.token for each in expected]
        assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert endings == ["length"] * len(whole.choices)
    assert roles == ["assistant"] * len(whole.choices)
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_without_include_usage_no_chunk_has_usage(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="the", stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_a_stream_of_many_prompts_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    call: dict[str, Any] = {"model": MODEL, "prompt": ["the", "and"], "n": 2, "seed": 3, **LONG}
    whole = client.completions.create(**call)
    texts = [""] * 4
    for chunk in client.completions.create(**call, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4


def test_prompts_of_tokens_are_those_of_their_text(client: openai.OpenAI, engine: Engine) -> None:
    tokens = engine.tokenizer.encode("the and of")
    answer = client.completions.create(model=MODEL, prompt=[tokens, tokens], temperature=0, **LONG)
    alone = client.completions.create(model=MODEL, prompt=tokens, temperature=0, **LONG)
    text = client.completions.create(model=MODEL, prompt="the and of", temperature=0, **LONG)
    assert {choice.text for choice in answer.choices} == {alone.choices[0].text} == {text.choices[0].text}


def test_the_seed_decides_and_speculation_does_not(client: openai.OpenAI) -> None:
    def text(seed: int, speculation: str) -> str:
        body = {"ignore_eos": True, "speculation": speculation}
        answer = client.completions.create(
            model=MODEL, prompt="the and the and", max_tokens=24, seed=seed, extra_body=body
        )
        return answer.choices[0].text

    assert text(1, "off") == text(1, "max")
    assert text(1, "auto") != text(2, "auto")


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="the and", temperature=0, **LONG).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    for stops in (stop, ["never to be seen", stop]):
        (choice,) = client.completions.create(model=MODEL, prompt="the and", temperature=0, stop=stops, **LONG).choices
        assert choice.text == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"
        assert (choice.model_extra or {})["stop_reason"] == stop


def test_a_bias_decides(client: openai.OpenAI, engine: Engine) -> None:
    (token,) = engine.tokenizer.encode(" of")
    answer = client.completions.create(model=MODEL, prompt="the", logit_bias={str(token): 100}, max_tokens=3)
    assert answer.choices[0].text == " of of of"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, **LONG
    )
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == 24
    for each in scores.content:
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].token == each.token  # greedy takes the most likely
        assert each.top_logprobs[0].logprob == each.logprob <= 0
    joined = b"".join(bytes(each.bytes or ()) for each in scores.content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_an_echoed_prompt_is_scored(client: openai.OpenAI) -> None:
    call: dict[str, Any] = {"model": MODEL, "prompt": "the and of the", "echo": True, "logprobs": 2, "temperature": 0}
    call |= {"max_tokens": 4, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**call)
    (choice,) = whole.choices
    scores = choice.logprobs
    assert choice.text.startswith("the and of the")
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert scores.tokens[:4] == ["the", " and", " of", " the"]
    assert scores.text_offset is not None
    assert scores.text_offset[:4] == [0, 3, 7, 10]
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 4 + 4
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    for token, score, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[1:]:
        assert top[token] == score <= 0
        assert len(top) in (2, 3)

    chunks = [chunk.choices[0] for chunk in client.completions.create(**call, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens or ()] == scores.tokens
    assert [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset or ()] == scores.text_offset


def test_every_choice_of_an_echoed_prompt_is_scored(client: openai.OpenAI) -> None:
    prompts = ["the and of", "the to in"]
    call: dict[str, Any] = {"model": MODEL, "prompt": prompts, "n": 2, "echo": True, "logprobs": 0}
    answer = client.completions.create(**call, extra_body={"ignore_eos": True})
    for choice, prompt in zip(answer.choices, ("the and of", "the and of", "the to in", "the to in"), strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert "".join((choice.logprobs.tokens or [])[:3]) == prompt
        assert len(choice.logprobs.token_logprobs or ()) == 3 + 16


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"prompt": "the " * 300}, "prompt"),
        ({"prompt": "the " * 1000}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": ["fine", ""]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 100, "n": 100}, "prompt"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"prompt": "x", "extra_body": {"speculate": True}}, "speculate"),
        ({"prompt": "x", "echo": True, "logprobs": 1, "n": 2, "stream": True}, "n"),
    ],
)
def test_bad_calls_name_the_field(client: openai.OpenAI, engine: Engine, call: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, **call)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    until(lambda: not engine.has_work)  # of several prompts none stays behind


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": MESSAGES, "extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "extra_body": {"chat_template_kwargs": {"self": 1}}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "the " * 1000}]}, "prompt"),
    ],
)
def test_bad_chats_name_the_field(client: openai.OpenAI, call: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, **call)
    assert caught.value.param == param


def test_any_name_of_the_model_will_do() -> None:
    with serving(StandIn(), aliases=["org/other name"]) as server, server.client() as client:
        assert [card.id for card in client.models.list()] == [MODEL, "org/other name"]
        assert client.models.retrieve("org/other name").id == "org/other name"
        for name in (MODEL, "org/other name"):
            assert client.completions.create(model=name, prompt="x", max_tokens=1).model == MODEL


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_a_body_above_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 2**17)
    assert caught.value.status_code == 413
    assert caught.value.type == "invalid_request_error"


def test_leaving_a_stream_frees_its_pages(client: openai.OpenAI, engine: Engine) -> None:
    until(lambda: not engine.has_work)
    before = free_pages(engine)
    body = {"ignore_eos": True}
    stream = client.completions.create(model=MODEL, prompt="the", n=4, max_tokens=250, stream=True, extra_body=body)
    next(iter(stream))
    stream.close()
    until(lambda: not engine.has_work)
    assert free_pages(engine) == before


def test_sixteen_clients_at_once(server: Server, engine: Engine) -> None:
    def ask(number: int) -> tuple[str, str]:
        with server.client() as client:
            call: dict[str, Any] = {"model": MODEL, "prompt": f"{number} the and", "seed": number, **LONG}
            whole = client.completions.create(**call).choices[0].text
            stream = client.completions.create(**call, stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert all(whole == streamed for whole, streamed in answers)
    assert len({whole for whole, _ in answers}) == 16
    until(lambda: not engine.has_work)
    engine.check_integrity()
