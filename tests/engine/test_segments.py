"""A model run range by range, from hidden states and with taps, is the whole model."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

from parlay.config import EngineConfig
from parlay.engine.attention import forward_batch
from parlay.engine.batch import pack
from parlay.engine.engine import Engine
from parlay.engine.gathered import GatheredAttention
from parlay.types import Request, Row, SamplingParams
from tests.architectures import make_model, plain_model

TOKENS = (7, 3, 9, 3, 7, 1, 250)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt"])
@torch.inference_mode()
def test_ranges_of_layers_add_up_to_the_model(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind)
    read: list[torch.Tensor] = []  # by the head
    theirs = plain_model(folder)
    theirs.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    plain = theirs(input_ids=torch.tensor([TOKENS]), use_cache=False, output_hidden_states=True)
    engine = Engine(EngineConfig(str(folder), dtype="float64", speculation=None))
    model = engine.model
    request = Request("r", TOKENS, SamplingParams())
    row = Row(0, request, 0, array("i", TOKENS), len(TOKENS), 0, len(TOKENS), 0, 0, [1])
    batch = pack([row], [None], model.kv.page_size, model.device)
    reads = torch.arange(len(TOKENS))
    with forward_batch(GatheredAttention(model.kv, batch)):
        whole = model.segments(batch.tokens, batch.positions, taps=(0, 1, 2, 3), reads=reads)
        lower = model.segments(batch.tokens, batch.positions, layers=range(1))
        upper = model.segments(batch.tokens, batch.positions, layers=range(1, 2), hidden=lower.hidden, reads=reads)
    assert torch.equal(lower.hidden, whole.taps[1])
    assert torch.equal(upper.hidden, whole.hidden)
    assert torch.equal(upper.logits, whole.logits)
    assert len(lower.logits) == 0
    assert whole.taps.keys() == {0, 1, 2, 3}
    assert torch.allclose(whole.logits, plain.logits[0], atol=1e-6)
    for layer in (0, 1):
        assert torch.allclose(whole.taps[layer], plain.hidden_states[layer][0], atol=1e-6)
    assert torch.allclose(whole.taps[3], read[0], atol=1e-5)


def test_verify_hands_out_taps_of_the_packed_step(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(str(make_model(tmp_path, "llama")), dtype="float64", speculation=None))
    rows = [
        Row(seq, Request(str(seq), TOKENS, SamplingParams()), 0, array("i", TOKENS), 7, 0, 7, 0, 0, [1 + seq])
        for seq in range(2)
    ]
    for model in (engine.model, Engine(EngineConfig(engine.config.model, dtype="float64", parity="strict")).model):
        scores = model.verify(rows, [None, None], taps=(2, 3))
        assert scores.taps.keys() == {2, 3}
        for states in scores.taps.values():
            assert states.shape == (14, 32)
            assert torch.allclose(states[:7], states[7:])
