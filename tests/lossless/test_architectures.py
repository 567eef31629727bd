"""On every architecture, output is plain transformers' own.

Ragged trees, chunked prefill, preemption and prefix reuse all happen on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, MambaConfig

from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.engine.attention import UnsupportedModel
from parlay.engine.checkpoint import CheckpointError
from parlay.engine.engine import Engine
from parlay.types import Request, SamplingParams
from tests.architectures import EXTRA, greedy, make_model, plain_model, prompts_of
from tests.gamblers import NoisyOracle, RandomPolicy
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

LENGTH = 14


def position_bytes(engine: Engine) -> int:
    kv = engine.model.kv
    return sum(slots[0].numel() * slots.element_size() for slots in kv.slots)


@pytest.mark.parametrize("kind", EXTRA)
def test_greedy_identity(kind: str, tmp_path: Path) -> None:
    check_greedy_identity(kind, tmp_path, {"dtype": "float64"})


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kind", [kind if kind == "llama" else pytest.param(kind, marks=pytest.mark.slow) for kind in EXTRA]
)
def test_greedy_identity_of_compiled_layers(kind: str, tmp_path: Path, compiled: dict[str, Any]) -> None:
    check_greedy_identity(kind, tmp_path, compiled)


def check_greedy_identity(kind: str, tmp_path: Path, layers: dict[str, Any]) -> None:
    dtype = getattr(torch, layers["dtype"])
    folder = make_model(tmp_path, kind, dtype)
    plain = plain_model(folder, dtype)
    prompts = prompts_of(10)
    expected = {prompt: greedy(plain, prompt, LENGTH) for prompt in prompts}

    engine = Engine(
        EngineConfig(
            str(folder), page_size=4, max_num_batched_tokens=24, max_num_seqs=6,
            kv_cache_memory=26 * 4 * _bytes_per_position(kind, dtype), speculation=None, seed=0, **layers,
        )
    )  # fmt: skip
    assert all(engine.model.segments.programs) == ("compile" in layers)
    engine.drafters = Drafters([NoisyOracle(expected, VOCAB_SIZE)])
    engine.policy = RandomPolicy(0, ["noisy_oracle"])
    assert position_bytes(engine) == _bytes_per_position(kind, dtype)
    found: dict[str, list[int]] = {}
    accepted = 0
    for number, prompt in enumerate(prompts * 2):
        params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
        engine.add(Request(str(number), prompt, params))
    reused = 0
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
            accepted += delta.stats.accepted
        engine.check_integrity()
        reused = max(
            reused, sum(engine.scheduler.blocks.is_shared(p) for s in engine.scheduler.running for p in s.pages)
        )
    assert [tuple(found[str(i)]) for i in range(2 * len(prompts))] == [expected[prompt] for prompt in prompts * 2]
    assert accepted > 50
    assert engine.scheduler.preemptions > 0
    assert reused > 0
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_pages


def _bytes_per_position(kind: str, dtype: torch.dtype) -> int:
    heads = 2 if "num_key_value_heads" in AutoConfig.for_model(kind).to_dict() else 4
    return 2 * 2 * heads * 8 * dtype.itemsize  # layers, key and value, heads, head size, bytes


def save(folder: Path, model: object) -> str:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_recurrent_models_are_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, state_size=4)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedModel, match=r"mamba .* rolled back"):
        Engine(EngineConfig(folder))


def test_hybrid_models_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen3")
    config = AutoConfig.for_model("qwen3_next")
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        Engine(EngineConfig(str(folder)))


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    AutoConfig.for_model("deepseek_v3").save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="latent"):
        Engine(EngineConfig(str(folder)))


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    BartConfig().save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        Engine(EngineConfig(str(folder)))


def test_unknown_architectures_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    (folder / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(CheckpointError):
        Engine(EngineConfig(str(folder)))


def test_the_self_check_catches_wrong_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parlay.engine import self_check

    folder = make_model(tmp_path, "llama")
    honest = self_check.check

    def shifted(model: object, expected: self_check.Reference) -> None:
        run = model.segments  # type: ignore[attr-defined]
        model.segments = lambda tokens, positions, **kw: run(tokens, positions.flip(0), **kw)  # type: ignore[attr-defined]
        honest(model, expected)  # type: ignore[arg-type]

    monkeypatch.setattr(self_check, "check", shifted)
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        Engine(EngineConfig(str(folder), dtype="float64"))
