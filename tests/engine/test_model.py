"""What is learnt, limited and refused when a model is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from parlay import registry
from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.engine import self_check
from parlay.engine.attention import UnsupportedModel
from parlay.engine.checkpoint import resolve
from parlay.engine.engine import Engine
from parlay.engine.model import TargetModel, load_model
from tests.architectures import make_model
from tests.tiny import VOCAB_SIZE, tiny_tokenizer


def save(folder: Path, kind: str, **options: Any) -> Path:
    config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, pad_token_id=0, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_long_rope_is_served_up_to_its_original_context(tmp_path: Path) -> None:
    """Beyond it every position turns by other factors, so that one long row would change all others."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = save(
        tmp_path, "phi3", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope,
    )  # fmt: skip
    assert Engine(EngineConfig(str(folder), dtype="float64", speculation=None)).max_model_len == 32
    with pytest.raises(ValueError, match="max_model_len: 64 exceeds the model's context of 32"):
        Engine(EngineConfig(str(folder), dtype="float64", max_model_len=64))


def test_strict_parity_is_refused_where_it_cannot_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here a token's logits depend on its line in the tile, as those of a careless kernel would."""
    engine = Engine(EngineConfig(str(make_model(tmp_path, "llama")), dtype="float64", parity="strict"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    head = engine.model.segments.model.get_output_embeddings()  # type: ignore[operator]
    lines = torch.arange(16, dtype=torch.float64)[:, None] * 1e-12
    head.register_forward_hook(lambda _m, _a, logits: logits + lines[: logits.shape[1]])
    with pytest.raises(UnsupportedModel, match="--parity strict cannot hold here"):
        self_check.check_strict(engine.model)
    assert "uses one" in caplog.text


def test_mixtures_of_experts_cannot_be_strict(tmp_path: Path) -> None:
    folder = save(
        tmp_path, "mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="mixture-of-experts"):
        Engine(EngineConfig(str(folder), dtype="float64", parity="strict"))


def test_the_self_check_refuses_a_model_that_looks_at_its_neighbours(tmp_path: Path) -> None:

    class Blurred(torch.nn.Module):
        """Mixes every token with the one packed before it."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + hidden.roll(1, dims=1)

    folder = str(make_model(tmp_path, "llama"))
    model = load_model(resolve(folder), EngineConfig(folder, dtype="float64"))
    expected = self_check.reference(model)
    model.model.model.norm = torch.nn.Sequential(Blurred(), model.model.model.norm)
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        self_check.check(TargetModel(model, 4, 16, strict=False), expected)


def test_a_drafter_answers_to_the_name_it_is_registered_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.drafters, "find", lambda name: PromptLookup)
    with pytest.raises(ValueError, match="registered as 'lucky' calls itself 'prompt_lookup'"):
        Engine(
            EngineConfig(str(make_model(tmp_path, "llama")), dtype="float64", speculation=Bet("lucky", Tree.chain(2)))
        )


def test_a_model_that_looks_at_later_tokens_is_refused(tmp_path: Path) -> None:
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = save(tmp_path, "bert", **options)
    with pytest.raises(UnsupportedModel, match="looks at later tokens"):
        Engine(EngineConfig(str(folder), dtype="float64"))


def test_an_end_token_outside_the_vocabulary_is_no_token(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = [3, VOCAB_SIZE]
    settings.save_pretrained(folder)
    engine = Engine(EngineConfig(str(folder), dtype="float64"))
    assert 3 in engine.eos
    assert max(engine.eos) < VOCAB_SIZE
