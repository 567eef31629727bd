from __future__ import annotations

import json

from parlay.server.logprobs import CompletionLogprobs, chat_logprobs
from parlay.types import SamplingParams, TokenLogprobs
from tests.server.stand_in import ByteTokenizer


def test_infinite_and_undefined_scores_are_written_as_very_low_ones() -> None:
    scored = [TokenLogprobs(65, float("nan"), ((66, float("-inf")), (67, -0.5)))]
    tokenizer = ByteTokenizer()
    content = chat_logprobs(tokenizer, scored)["content"][0]
    assert content["logprob"] == content["top_logprobs"][0]["logprob"] == -9999.0
    piece = CompletionLogprobs(tokenizer, SamplingParams()).piece(scored)
    assert piece["top_logprobs"] == [{"A": -9999.0, "B": -9999.0, "C": -0.5}]
    json.dumps([content, piece], allow_nan=False)
