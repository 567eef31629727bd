"""Who runs when, and whose pages are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.engine.engine import Engine
from parlay.policy.fixed import Off
from parlay.types import Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model
from tests.gamblers import NoisyOracle, RandomPolicy
from tests.tiny import VOCAB_SIZE

POSITION = 2 * 2 * 2 * 8 * 8  # bytes of KV, all layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def engine_for(folder: Path, **options: Any) -> Engine:
    return Engine(EngineConfig(str(folder), dtype="float64", self_check=False, speculation=None, **options))


def test_guesses_accepted_beside_a_shared_prompt_leave_its_pages_alone(folder: Path) -> None:
    """The first choice writes accepted guesses behind the prompt before the others have had a turn."""
    plain = plain_model(folder)
    prompt = (5, 6, 7, 8, 9, 10, 11)  # the page of its last token has room for what follows
    output = greedy(plain, prompt, 24)
    engine = engine_for(folder, page_size=4, max_num_seqs=1, max_num_batched_tokens=64)
    engine.drafters = Drafters([NoisyOracle({prompt: output}, VOCAB_SIZE)])
    engine.policy = RandomPolicy(0, ["noisy_oracle"])
    engine.add(Request("r", prompt, SamplingParams(n=3, temperature=0, max_tokens=12, ignore_eos=True)))
    found: dict[int, tuple[int, ...]] = {}
    accepted = 0
    while engine.has_work:
        for delta in engine.step():
            found[delta.choice] = (*found.get(delta.choice, ()), *delta.tokens)
            accepted += delta.stats.accepted
        engine.check_integrity()
    assert accepted > 10
    assert set(found.values()) == {output[:12]}
    follow_up = (*prompt, *output[:9])
    engine.drafters = Drafters([])
    engine.policy = Off()
    engine.add(Request("s", follow_up, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    (row,) = engine.scheduler.schedule()
    assert row.start >= 8, "the published pages are found again"
    again: tuple[int, ...] = ()
    while engine.has_work:
        again += tuple(token for delta in engine.step() for token in delta.tokens)
        engine.check_integrity()
    assert again == output[9:17]


def test_short_prompts_are_admitted_beside_a_long_one(folder: Path) -> None:
    """A long prompt in chunks neither delays a short one nor is starved by those that keep coming."""
    engine = engine_for(folder, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=128)
    engine.add(Request("long", tuple(range(1, 101)), SamplingParams(max_tokens=1, temperature=0)))
    engine.step()
    done: list[str] = []
    for number in range(40):
        engine.add(Request(str(number), tuple(range(1, 12)), SamplingParams(max_tokens=1, temperature=0)))
        done += [delta.request_id for delta in engine.step() if delta.finish_reason]
        if "long" in done:
            break
    assert done[0] == "0"
    assert "long" in done


def test_a_context_larger_than_the_pool_shrinks_to_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_for(folder, page_size=4, kv_cache_memory=41 * 4 * POSITION // 4)
    assert engine.max_model_len == 4 * engine.scheduler.blocks.num_pages < 128
    assert "the KV cache holds 36 positions" in caplog.text
    with pytest.raises(ValueError, match="max_model_len: 100 positions do not fit"):
        engine_for(folder, page_size=4, kv_cache_memory=41 * 4 * POSITION // 4, max_model_len=100)
    with pytest.raises(ValueError, match="kv_cache_memory"):
        engine_for(folder, page_size=16, kv_cache_memory=POSITION)
