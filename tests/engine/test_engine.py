"""What users see of the engine: log-probabilities, sharing of prompts, configuration, offline generation."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parlay.bets import Bet, Tree, parse_bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.engine.engine import Engine
from parlay.engine.llm import LLM
from parlay.types import Delta, EngineStatus, InvalidRequest, Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model, prompts_of

REPETITIVE = tuple([7, 8, 9, 10, 11] * 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def engine_for(folder: Path, **options: Any) -> Engine:
    return Engine(EngineConfig(str(folder), dtype="float64", self_check=False, **options))


def finish(engine: Engine) -> list[Delta]:
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
        engine.check_integrity()
    return deltas


def test_logprobs_are_the_models_own(folder: Path) -> None:
    """Of prompt and output, with guesses accepted, chunked prefill, and a prefix that others have published."""
    plain = plain_model(folder)
    engine = engine_for(folder, max_num_batched_tokens=12, max_num_seqs=4, page_size=4)
    engine.add(Request("first", REPETITIVE, SamplingParams(max_tokens=4, temperature=0)))
    finish(engine)
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    engine.add(Request("r", REPETITIVE, params))
    deltas = finish(engine)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert tuple(tokens) == greedy(plain, REPETITIVE, 20)
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([[*REPETITIVE, *tokens]])).logits[0]
    logprobs = logits.log_softmax(-1)
    scored = [entry for delta in deltas for entry in delta.prompt_logprobs]
    scored += [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token for entry in scored] == [*REPETITIVE[1:], *tokens]
    for position, entry in enumerate(scored):
        assert entry.logprob == pytest.approx(float(logprobs[position, entry.token]), abs=1e-5)
        best = logprobs[position].topk(len(entry.top))
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert {len(entry.top) for entry in scored} == {2, 3}


def test_choices_share_the_prompts_pages(folder: Path) -> None:
    engine = engine_for(folder, page_size=4, prefix_caching=False)
    prompt = tuple(range(1, 31))
    engine.add(Request("r", prompt, SamplingParams(n=5, seed=1, max_tokens=8, ignore_eos=True)))
    pages = engine.scheduler.blocks
    used = 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        used = max(used, pages.num_pages - pages.num_free)
    # 7 full pages shared; each choice has a copy of the page of the prompt's last tokens, and 8 more positions.
    assert used <= 7 + 5 * 3


def test_a_shared_prefix_is_run_once(folder: Path) -> None:
    engine = engine_for(folder, page_size=4)
    prompt = tuple(range(1, 31))
    engine.add(Request("first", prompt, SamplingParams(max_tokens=1, temperature=0)))
    finish(engine)
    engine.add(Request("second", (*prompt, 5), SamplingParams(max_tokens=1, temperature=0)))
    (row,) = engine.scheduler.schedule()
    assert (row.start, row.count) == (28, 3)


def test_the_status_counts_choices_pages_and_prefixes(folder: Path) -> None:
    engine = engine_for(folder, page_size=4, max_num_seqs=2)
    assert engine.status() == EngineStatus(slots=2)
    prompt = tuple(range(1, 31))
    engine.add(Request("r", prompt, SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True)))
    assert (engine.status().running, engine.status().waiting) == (0, 3)
    began = time.perf_counter()
    (delta,) = engine.step()
    assert 0 < delta.queued - began < time.perf_counter() - began  # the request says that it arrived at 0
    status = engine.status()
    assert (status.running, status.waiting, status.prefix_queries, status.prefix_hits) == (1, 2, 30, 0)
    assert status.kv_usage == pytest.approx(8 / engine.scheduler.blocks.num_pages)
    finish(engine)
    # The other two choices take over the first one's pages, and look nothing up.
    assert engine.status() == EngineStatus(slots=2, prefix_queries=30)
    engine.add(Request("again", prompt, SamplingParams(max_tokens=1)))
    finish(engine)
    assert engine.status() == EngineStatus(slots=2, prefix_queries=60, prefix_hits=28)


def test_guesses_shrink_when_pages_are_short_and_preempt_nobody(folder: Path) -> None:
    position = 2 * 2 * 2 * 8 * 8
    engine = engine_for(
        folder, page_size=2, kv_cache_memory=30 * 2 * position, speculation=Bet("prompt_lookup", Tree.chain(8))
    )
    for name in "ab":
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
        engine.add(Request(name, tuple([3, 4] * 9), params))
    largest = 0
    while engine.has_work:
        largest = max([largest, *(delta.stats.drafted for delta in engine.step())])
        engine.check_integrity()
    assert 0 < largest <= 8
    assert engine.scheduler.preemptions == 0


def test_no_tree_passes_the_limits(folder: Path) -> None:
    """Neither max_tokens nor the context may be passed by a guess."""
    engine = engine_for(folder, max_model_len=40, speculation=Bet("prompt_lookup", Tree.chain(8)))
    for number, (prompt, limit) in enumerate(((REPETITIVE, 3), (REPETITIVE, 10), ((1, 2) * 19, None))):
        params = SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True)
        engine.add(Request(str(number), prompt, params))
    lengths = {"0": 0, "1": 0, "2": 0}
    for delta in finish(engine):
        lengths[delta.request_id] += len(delta.tokens)
        assert delta.stats.drafted <= 8
    assert lengths == {"0": 3, "1": 10, "2": 2}


def test_a_request_may_refuse_guesses(folder: Path) -> None:
    engine = engine_for(folder)
    engine.drafters = Drafters([PromptLookup()])
    for name in ("off", "auto"):
        engine.add(Request(name, REPETITIVE, SamplingParams(max_tokens=12, temperature=0, speculation=name)))
    drafted = {"off": 0, "auto": 0}
    for delta in finish(engine):
        drafted[delta.request_id] += delta.stats.drafted
    assert drafted["off"] == 0 < drafted["auto"]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(10**6,)), "stop_token_ids"),
        (SamplingParams(max_tokens=1000), "max_tokens"),
    ],
)
def test_bad_requests_name_the_field(folder: Path, params: SamplingParams, field: str) -> None:
    engine = engine_for(folder)
    with pytest.raises(InvalidRequest) as error:
        engine.add(Request("r", (1, 2), params))
    assert error.value.param == field
    assert not engine.has_work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "max_num_seq": 3}, "max_num_seqs"),
        ({"model": "m", "max_num_seqs": 0}, "max_num_seqs"),
        ({"model": "m", "max_num_batched_tokens": 2}, "max_num_batched_tokens"),
        ({"model": "m", "speculation": "prompt_lookup:x"}, "METHOD:DEPTH"),
        ({"model": "m", "speculation": "prompt_lookup:[0]"}, "METHOD:DEPTH"),
        ({"model": "m", "parity": "exact"}, "parity: must be one of fast, strict"),
        ({"model": "m", "dtype": "int8"}, "dtype: must be one of auto, bfloat16"),
    ],
)
def test_bad_configurations_say_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_dict(values)


def test_forms_of_speculation() -> None:
    assert parse_bet("off") is None
    assert parse_bet("prompt_lookup:0") is None
    assert parse_bet("auto") == "auto"
    assert parse_bet("prompt_lookup:7") == Bet("prompt_lookup", Tree.chain(7))
    assert parse_bet("prompt_lookup:[-1, -1, 0]") == Bet("prompt_lookup", Tree((-1, -1, 0)))


def test_an_unknown_drafter_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'prompt_lookup'"):
        engine_for(folder, speculation=parse_bet("prompt_lokup:3"))


def test_generate(folder: Path) -> None:
    llm = LLM(str(folder), dtype="float64", max_num_seqs=4)
    plain = plain_model(folder)
    prompts = prompts_of(9)
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [greedy(plain, prompt, 7) for prompt in prompts]
    (text,) = llm.generate("the cat", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert text.prompt == "the cat"
    assert text.outputs[0].text == llm.engine.tokenizer.decode(text.outputs[0].token_ids)
    many = [SamplingParams(max_tokens=2, n=2, seed=i) for i in range(3)]
    assert [len(output.outputs) for output in llm.generate(prompts[:3], many, use_tqdm=False)] == [2, 2, 2]
    with pytest.raises(ValueError, match="one per prompt"):
        llm.generate(prompts, many, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="context"):
        llm.generate([(1, 2), (1,) * 500], params, use_tqdm=False)
    assert not llm.engine.has_work, "what was accepted before the bad prompt must not linger"
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)


def test_an_interrupted_generation_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(folder), dtype="float64")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.policy, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts_of(3), use_tqdm=False)
    llm.engine.check_integrity()
    assert not llm.engine.has_work


def test_drafters_come_from_entry_points() -> None:
    """A third party's package is found by name; here, by a distribution made on the spot."""
    script = """
import importlib.metadata as m
point = m.EntryPoint("lucky", "parlay.drafters.prompt_lookup:PromptLookup", "parlay.drafters")
m.entry_points = lambda group: [point] if group == "parlay.drafters" else []
from parlay import registry
assert registry.drafters.create("lucky", max_ngram=2).ngrams == range(2, 0, -1)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
