"""Prompts scored over HTTP as evaluation harnesses do it, against transformers' own log-probabilities."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from transformers import LlamaForCausalLM

from parlay.engine.engine import Engine
from tests.serving import MODEL

CONTEXT, CONTINUATION = "the and of the other", " and then the rest of it"


def expected(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """[positions - 1, vocab] log-probabilities of what follows each token but the last."""
    model = LlamaForCausalLM.from_pretrained(engine.config.model, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_continuation_is_scored_as_transformers_scores_it(
    client: openai.OpenAI, engine: Engine, max_tokens: int, stream: bool
) -> None:
    context, continuation = map(engine.tokenizer.encode, (CONTEXT, CONTINUATION))
    tokens = [*context, *continuation]
    call: dict[str, Any] = {"model": MODEL, "prompt": [tokens], "temperature": 0, "seed": 1234}
    call |= {"max_tokens": max_tokens, "logprobs": 1, "echo": True}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**call, stream=True)]
    else:
        chunks = [client.completions.create(**call).choices[0]]
    scores = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    found = [score for piece in scores for score in piece.token_logprobs or ()]
    tops = [top for piece in scores for top in piece.top_logprobs or ()]
    assert len(found) == len(tops) == len(tokens) + max_tokens
    assert found[0] is None
    logprobs = expected(engine, tokens)
    own = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert found[1 : len(tokens)] == pytest.approx(own.tolist(), abs=1e-4)
    assert [max(top.values()) for top in tops[1 : len(tokens)]] == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-4)
    # What a harness adds up, and whether greedy decoding would have said the continuation.
    end = len(tokens)
    assert sum(score or 0 for score in found[len(context) : end]) == pytest.approx(
        float(own[len(context) - 1 :].sum()), abs=1e-3
    )
    text = "".join(chunk.text for chunk in chunks)
    assert text.startswith(CONTEXT + CONTINUATION)
    assert chunks[-1].finish_reason in ("length", "stop")


def test_no_tokens_are_a_prompt_alone(client: openai.OpenAI) -> None:
    call: dict[str, Any] = {"model": MODEL, "prompt": ["the and", "of"], "n": 2, "echo": True, "max_tokens": 0}
    answer = client.completions.create(**call, stop="x", logprobs=0)
    assert [choice.text for choice in answer.choices] == ["the and", "the and", "of", "of"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert [(choice.logprobs and choice.logprobs.tokens) for choice in answer.choices[1:3]] == [
        ["the", " and"],
        ["o", "f"],
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    unscored = client.completions.create(**call)
    assert [choice.text for choice in unscored.choices] == ["the and", "the and", "of", "of"]
    assert unscored.choices[0].logprobs is None


@pytest.mark.parametrize("wish", [{}, {"echo": True, "extra_body": {"min_tokens": 1}}])
def test_no_tokens_without_an_echo_are_refused(client: openai.OpenAI, wish: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="with echo") as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=0, **wish)
    assert caught.value.param == "max_tokens"
