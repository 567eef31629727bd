"""The same seed gives the same text, whatever is guessed and whoever shares the batch; in strict parity, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parlay.bets import Tree
from parlay.config import EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.drafters.suffix import Suffix
from parlay.engine.engine import Engine
from parlay.policy.trees import kary
from parlay.types import Request, SamplingParams, TokenLogprobs
from tests.architectures import make_model, prompts_of
from tests.drafting import engine_with, method_of
from tests.gamblers import RandomPolicy, RandomSampler
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

REPETITIVE = tuple([7, 8, 9, 10, 11] * 6)
LENGTH = 24

Output = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]


def engine_for(folder: Path, drafter: Drafter | str | None = None, **options: Any) -> Engine:
    """With a drafter, or one of those that have weights by its name, and a policy that bets at random."""
    if isinstance(drafter, str):
        engine = engine_with(folder, drafter, **options)
        engine.policy = RandomPolicy(1, [method_of(drafter)])
        return engine
    settings: dict[str, Any] = {
        "dtype": "float64",
        "speculation": None,
        "seed": 0,
        "self_check": False,
    } | options
    engine = Engine(EngineConfig(str(folder), **settings))
    assert all(engine.model.segments.programs) == (settings.get("compile") == "wait")
    if drafter is not None:
        engine.drafters = Drafters([drafter])
        engine.policy = RandomPolicy(1, [drafter.name])
    return engine


def run(engine: Engine, prompts: Sequence[tuple[int, ...]], **params: Any) -> list[Output]:
    """Output tokens and their log-probabilities for every prompt, all of them batched."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, logprobs=0, **params)
        engine.add(Request(str(number), prompt, sampling))
    found: list[Output] = [((), ())] * len(prompts)
    while engine.has_work:
        for delta in engine.step():
            tokens, logprobs = found[int(delta.request_id)]
            found[int(delta.request_id)] = (tokens + delta.tokens, logprobs + delta.logprobs)
        engine.check_integrity()
    return found


def tokens(outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    return [some for some, _ in outputs]


DRAFTERS: dict[str, Callable[[], Drafter | str]] = {
    "eagle": lambda: "eagle",
    "medusa": lambda: "medusa",
    "draft model": lambda: "draft_model",
    "early exit": lambda: "self",
    "trained early exit": lambda: "trained self",
    "prompt lookup": lambda: PromptLookup(Tree.chain(6)),
    "prompt lookup tree": lambda: PromptLookup(Tree((-1, -1, -1, 0, 0, 1, 3, 3))),
    "suffix tree": lambda: Suffix(kary(2, 3), least=0.0),
    "hostile sampler": lambda: RandomSampler(VOCAB_SIZE, seed=9),
}
PARAMS = {
    "plain": {},
    "filtered": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "biased": {"logit_bias": {7: 5.0, 8: -100.0}, "min_tokens": 4, "stop_token_ids": (9,)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("mode", ["coupled", "greedy"])
def test_output_does_not_depend_on_the_drafter(
    folder: Path, layers: dict[str, Any], drafter: str, params: str, mode: str
) -> None:
    """Off, alone, one after the other, against a drafter in a batch of 8; processing included."""
    chance = {"seed": 1234} if mode == "coupled" else {"temperature": 0.0}
    sampling = {**PARAMS[params], **chance}
    prompts = [REPETITIVE, *prompts_of(7)]
    plain = engine_for(folder, **layers)
    alone = [tokens(run(plain, [prompt], **sampling))[0] for prompt in prompts]
    assert tokens(run(engine_for(folder, DRAFTERS[drafter](), **layers), prompts, **sampling)) == alone


def test_choices_of_one_seed_differ_and_do_not_depend_on_the_drafter(folder: Path, layers: dict[str, Any]) -> None:
    def choices(engine: Engine) -> dict[int, list[int]]:
        engine.add(Request("r", REPETITIVE, SamplingParams(n=4, seed=5, max_tokens=LENGTH, ignore_eos=True)))
        found: dict[int, list[int]] = {}
        while engine.has_work:
            for delta in engine.step():
                found.setdefault(delta.choice, []).extend(delta.tokens)
            engine.check_integrity()
        return found

    plain = choices(engine_for(folder, **layers))
    assert len({tuple(some) for some in plain.values()}) == 4
    assert choices(engine_for(folder, PromptLookup(Tree.chain(5)), max_num_batched_tokens=32, **layers)) == plain


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model wide enough that batch shapes change its sums."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chance", [{"temperature": 0.0}, {"seed": 3}], ids=["greedy", "coupled"])
def test_strict_parity_is_exact_to_the_bit(wide: Path, chance: dict[str, Any]) -> None:
    """Tokens and log-probabilities in bfloat16, alone against in a batch with guesses, chunks and another page size."""
    prompts = [REPETITIVE, tuple(range(1, 180)), *prompts_of(4)]
    options: dict[str, Any] = {"dtype": "bfloat16", "parity": "strict"}
    plain = engine_for(wide, **options)
    alone = [run(plain, [prompt], **chance)[0] for prompt in prompts]
    spec = engine_for(wide, PromptLookup(Tree.chain(4)), page_size=8, max_num_batched_tokens=48, **options)
    assert run(spec, prompts, **chance) == alone
    spec = engine_for(wide, RandomSampler(VOCAB_SIZE), page_size=8, max_num_batched_tokens=48, **options)
    assert run(spec, prompts, **chance) == alone


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More threads than cut the lines of a tile evenly, so that cuts fall inside of lines."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_strict_parity_does_not_depend_on_where_threads_cut(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": "float32", "parity": "strict"}
    prompts = [REPETITIVE, *prompts_of(4)]
    plain = engine_for(tmp_path, **options)
    alone = [run(plain, [prompt], temperature=0.0)[0] for prompt in prompts]
    spec = engine_for(tmp_path, RandomSampler(VOCAB_SIZE), max_num_batched_tokens=48, **options)
    assert run(spec, prompts, temperature=0.0) == alone
    assert torch.get_num_threads() == 3


def test_strict_parity_agrees_with_the_fast_path(folder: Path) -> None:
    prompts = [REPETITIVE, *prompts_of(5)]
    fast = run(engine_for(folder), prompts, temperature=0.0)
    strict = run(engine_for(folder, PromptLookup(Tree.chain(4)), parity="strict"), prompts, temperature=0.0)
    assert tokens(strict) == tokens(fast)
    for (_, one), (_, other) in zip(fast, strict, strict=True):
        assert [a.logprob for a in one] == pytest.approx([b.logprob for b in other], abs=1e-9)


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_strict_parity_honours_windows_and_soft_caps(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind)
    prompts = [REPETITIVE, *prompts_of(5)]
    fast = run(engine_for(folder), prompts, temperature=0.0)
    strict = run(engine_for(folder, PromptLookup(Tree.chain(4)), parity="strict"), prompts, temperature=0.0)
    assert tokens(strict) == tokens(fast)
