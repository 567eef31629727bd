"""What is recorded is what the target computes, also where it was computed for another text with the same beginning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parlay.config import EngineConfig
from parlay.train.conversations import Conversations
from parlay.train.recording import TOP, Recorder, load, recording_engine, save
from tests.architectures import plain_model
from tests.tiny import make_tiny_llama


@pytest.mark.parametrize("questions", [(), ("the answer", "an other thing")], ids=["made up", "given"])
def test_states_are_those_of_plain_transformers(
    tmp_path: Path, questions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parlay.train.conversations.QUESTION_TOKENS", 40)
    monkeypatch.setattr("parlay.train.conversations.ANSWER_TOKENS", 30)
    folder = make_tiny_llama(tmp_path / "model")
    config = EngineConfig(
        str(folder), dtype="float32", speculation=None, page_size=4, max_num_seqs=3, kv_cache_memory=500_000
    )
    engine = recording_engine(config, (0, 2))
    assert 400_000 < sum(pool.nbytes for pool in engine.model.kv.pools) <= 500_000, "states count as KV does"
    recorder = engine.drafters.by_name["recorder"]
    assert isinstance(recorder, Recorder)
    conversations = Conversations(engine, questions, "seed", 8)
    assert conversations.run(5) + conversations.run(5) == 8
    found = recorder.found
    assert len(found) == 8
    assert not engine.has_work
    assert engine.scheduler.prefix_hits > 50
    save(tmp_path / "saved", found)
    plain = plain_model(folder, torch.float32)
    for one, read in zip(found, load(tmp_path / "saved"), strict=True):
        assert read.tokens.equal(one.tokens)
        assert read.start == one.start < len(one)
        assert read.hidden.equal(one.hidden)
        with torch.inference_mode():
            out = plain(input_ids=one.tokens[None].long(), output_hidden_states=True)
        embedded = out.hidden_states[0][0]
        torch.testing.assert_close(one.hidden[:, 0].float(), embedded, rtol=0.01, atol=0.01)
        best = out.logits[0].log_softmax(-1).topk(TOP)
        torch.testing.assert_close(one.logprobs.float(), best.values, rtol=0.01, atol=0.01)
        assert (one.ids == best.indices).float().mean() > 0.99
