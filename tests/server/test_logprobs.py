from __future__ import annotations

import json

from parlay.server.logprobs import CompletionLogprobs, chat_logprobs
from parlay.types import SamplingParams, TokenLogprobs
from tests.server.stand_in import ByteTokenizer
from tests.serving import Server


def test_infinite_and_undefined_scores_are_written_as_very_low_ones() -> None:
    scored = [TokenLogprobs(65, float("nan"), ((66, float("-inf")), (67, -0.5)))]
    tokenizer = ByteTokenizer()
    content = chat_logprobs(tokenizer, scored)["content"][0]
    assert content["logprob"] == content["top_logprobs"][0]["logprob"] == -9999.0
    piece = CompletionLogprobs(tokenizer, SamplingParams()).piece(scored)
    assert piece["top_logprobs"] == [{"A": -9999.0, "B": -9999.0, "C": -0.5}]
    json.dumps([content, piece], allow_nan=False)


def test_token_ids_are_returned_where_they_are_asked_for(server: Server) -> None:
    """As vLLM has them: ids of prompt and answer, and scored tokens named by ids."""
    with server.http() as http:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "logprobs": 2, "n": 2, "ignore_eos": True}
        plain = http.post("/v1/completions", json=body).json()["choices"][1]
        assert "token_ids" not in plain
        asked = body | {"return_token_ids": True, "return_tokens_as_token_ids": True}
        choice = http.post("/v1/completions", json=asked).json()["choices"][1]
        assert choice["prompt_token_ids"] == [5, 6, 7]
        assert len(choice["token_ids"]) == 4
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        assert choice["text"] == plain["text"]
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "temperature": 0}
        asked = chat | {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
        answer = http.post("/v1/chat/completions", json=asked).json()["choices"][0]
        assert len(answer["token_ids"]) == 3
        assert len(answer["prompt_token_ids"]) > 3
        assert [entry["token"] for entry in answer["logprobs"]["content"]] == [
            f"token_id:{token}" for token in answer["token_ids"]
        ]
        stream = http.post("/v1/completions", json=body | {"n": 1, "return_token_ids": True, "stream": True}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in stream.splitlines() if line.startswith("data: {")]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == choice["token_ids"]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
