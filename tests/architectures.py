"""Tiny random models of every supported architecture, and plain transformers' own greedy outputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import VOCAB_SIZE, tiny_tokenizer

WINDOW = 8  # shorter than the sequences of the tests, so that it matters
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": _MIXED | {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _MIXED | {"head_dim": 8},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": _GPT2,
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"layer_types": ["full_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": WINDOW},
    "cohere": {},
    "nemotron": {"head_dim": 8},
}


def make_model(folder: Path, kind: str, dtype: torch.dtype = torch.float64, layers: int | None = None) -> Path:
    """Saves a random model of this architecture, with the byte-level tokenizer of the tests."""
    options = EXTRA[kind] if kind == "gpt2" else _COMMON | EXTRA[kind]
    options = options | ({} if layers is None else {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers})
    config = AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def plain_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """What plain transformers continues with, without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def prompts_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of 1 to 30 tokens, some with a beginning in common."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(1, 250, (n,), generator=generator).tolist()  # noqa: E731
    shared = draw(14)
    lengths = torch.randint(1, 17, (count,), generator=generator).tolist()
    return [(*(shared if i % 2 else ()), *draw(length)) for i, length in enumerate(lengths)]
