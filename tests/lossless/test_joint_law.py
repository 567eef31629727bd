"""Several steps in a row: sequences of a tiny random model occur as often as the model says (chi-square).

One-step exactness is not enough: a sampler that reuses randomness between steps passes it and fails here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.eagle_files import save_head
from parlay.drafters.exit_part import save_exit
from parlay.drafters.medusa_files import save_heads
from parlay.engine.engine import Engine
from parlay.types import Request, SamplingParams
from tests.architectures import plain_model
from tests.drafting import method_of, tiny_exit, tiny_head, tiny_medusa
from tests.gamblers import RandomPolicy, RandomSampler

VOCAB, LENGTH, SAMPLES = 4, 4, 6000
PROMPT = (0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four-words")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="a"))
    for place, seed in ((path, 3), (path / "draft", 4)):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).double().save_pretrained(place)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    save_exit(tiny_exit(hidden=16), path / "exit", "four words", int8=False)
    save_head(tiny_head(vocab=3, hidden=16, target_vocab=VOCAB), path / "head", int8=False)
    save_heads(tiny_medusa(vocab=3, hidden=16, target_vocab=VOCAB), path / "heads", int8=False)
    return path


def exact_law(folder: Path, top_k: int = 0) -> dict[tuple[int, ...], float]:
    """The model's probability of every continuation of PROMPT, where it chooses among its best tokens."""
    every = list(itertools.product(range(VOCAB), repeat=LENGTH))
    with torch.inference_mode():
        logits = plain_model(folder)(input_ids=torch.tensor([PROMPT + tail for tail in every])).logits
    logits = logits.masked_fill(logits < logits.topk(top_k or VOCAB).values[..., -1:], float("-inf"))
    chosen = logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1].gather(2, torch.tensor(every)[:, :, None])
    return dict(zip(every, chosen.sum((1, 2)).exp().tolist(), strict=True))


def make_engine(folder: Path, method: str, **options: Any) -> Engine:
    """An engine with one drafter, which bets on trees of all shapes."""
    source = {
        "draft_model": str(folder / "draft"),
        "eagle": str(folder / "head"),
        "medusa": str(folder / "heads"),
        "self": "1",
        "trained self": str(folder / "exit"),
    }
    given, method = source.get(method), method_of(method)
    bet = Bet(method, Tree.chain(6)) if given else None
    engine = Engine(
        EngineConfig(
            str(folder), max_num_seqs=64, max_num_batched_tokens=512, seed=1, self_check=False, speculation=bet,
            drafters={method: given} if given else {}, **options,
        )
    )  # fmt: skip
    if method == "random_sampler":
        engine.drafters = Drafters([RandomSampler(VOCAB, seed=5)])
    if method != "none":
        engine.policy = RandomPolicy(2, [method], largest=6)
    return engine


@pytest.mark.parametrize("mode", ["optimal", "coupled"])
@pytest.mark.parametrize("method", ["random_sampler", "none"])
def test_sequences_occur_as_often_as_the_model_says(
    folder: Path, layers: dict[str, Any], mode: str, method: str
) -> None:
    check_law(folder, make_engine(folder, method, **layers), mode, method)


@pytest.mark.parametrize("sampling", ["sequoia", "specinfer", "topk"])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "medusa", "self", "trained self"])
def test_drafters_that_sample_change_nothing(folder: Path, method: str, sampling: str) -> None:
    """The distributions that they hand to verification are those that they drew from; a head cannot say everything."""
    engine = make_engine(folder, method, dtype="float64", tree_sampling=sampling)
    check_law(folder, engine, "optimal", method, samples=2000)


@pytest.mark.parametrize("method", ["draft_model", "eagle", "medusa"])
def test_fewer_possible_tokens_than_siblings_change_nothing(folder: Path, method: str) -> None:
    """Where a filter leaves less than there are siblings, the others are uniform over what the drafter can say."""
    check_law(folder, make_engine(folder, method, dtype="float64"), "optimal", method, samples=3000, top_k=2)


def check_law(folder: Path, engine: Engine, mode: str, method: str, samples: int = SAMPLES, top_k: int = 0) -> None:
    for number in range(samples):
        seed = number if mode == "coupled" else None
        engine.add(
            Request(str(number), PROMPT, SamplingParams(max_tokens=LENGTH, seed=seed, ignore_eos=True, top_k=top_k))
        )
    found: dict[str, tuple[int, ...]] = {}
    accepted = 0
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] = (*found.get(delta.request_id, ()), *delta.tokens)
            accepted += delta.stats.accepted
    assert (accepted > samples / 8) == (method != "none")
    law = exact_law(folder, top_k)
    common = [sequence for sequence, probability in law.items() if probability * samples >= 5]
    counts = Counter(found.values())
    observed = [counts[sequence] for sequence in common]
    expected = [law[sequence] * samples for sequence in common]
    rest = samples - sum(expected)
    if rest >= 5:
        observed.append(samples - sum(observed))
        expected.append(rest)
    else:
        expected = [count * sum(observed) / sum(expected) for count in expected]
    assert chisquare(observed, expected).pvalue > 1e-4
