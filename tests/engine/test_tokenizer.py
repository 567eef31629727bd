from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from parlay.engine.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

PIECES = ("<unk>", "▁the", "the", "a", "<0xE2>", "▁", "</s>")
STRIPPING = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.mark.parametrize("decoder", [STRIPPING, decoders.Metaspace()], ids=["strip", "metaspace"])
def test_a_token_keeps_the_space_that_a_text_would_lose_at_its_beginning(decoder: decoders.Decoder) -> None:
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    inner = Inner(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoder
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"), 64)
    assert [tokenizer.token_text(vocab[piece]) for piece in ("▁the", "the", "▁")] == [" the", "the", " "]
    assert bytes(tokenizer.token_bytes(vocab["▁the"])) == b" the"
    assert tokenizer.token_text(vocab["</s>"]) == "</s>"
    assert tokenizer.token_text(vocab["</s>"], skip_special_tokens=True) == ""


def test_bytes_of_a_part_of_a_character() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), 64)
    tokens = tokenizer.encode("naïve")
    assert b"".join(bytes(tokenizer.token_bytes(token)) for token in tokens) == "naïve".encode()
