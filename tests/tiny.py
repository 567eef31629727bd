"""A random Llama with a byte-level tokenizer, small enough to be made in every test session."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<|end|>", "<|start|>", "<|pad|>")
MERGES = [
    ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("o", "n"),
    ("r", "e"), ("Ġ", "a"), ("in", "g"), ("o", "r"), ("e", "n"), ("e", "s"), ("a", "t"), ("i", "s"), ("Ġ", "w"),
    ("Ġ", "o"), ("i", "t"), ("Ġ", "s"), ("a", "r"), ("o", "u"), ("Ġo", "f"), ("l", "l"), ("e", "d"), ("a", "l"),
    ("Ġ", "b"), ("Ġ", "c"), ("Ġ", "in"), ("Ġ", "t"), ("Ġt", "o"), ("Ġ", "f"), ("i", "c"), ("r", "o"), ("h", "e"),
    ("l", "e"), ("Ġ", "m"), ("Ġ", "p"), ("o", "m"), ("u", "r"),
]  # fmt: skip
END, START, PAD = range(256 + len(MERGES), 256 + len(MERGES) + len(SPECIALS))
VOCAB_SIZE = PAD + 1
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tiny_llama(folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Saves model and tokenizer to `folder`, so that transformers and the engine can load them from there."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # Larger than usual: with the usual spread a random model repeats one token for ever.
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        dtype=torch.float32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [left + right for left, right in MERGES]
    inner = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end, start, pad = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=start, eos_token=end, pad_token=pad, clean_up_tokenization_spaces=False
    )
