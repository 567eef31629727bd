"""Random arrivals, aborts and page pools: nothing leaks, nothing hangs, and every finished output is right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from parlay.bets import Bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.drafters.suffix import Suffix
from parlay.engine.engine import Engine
from parlay.policy.trees import kary
from parlay.types import InvalidRequest, Request, SamplingParams
from tests.architectures import make_model, prompts_of
from tests.drafting import method_of, sources
from tests.gamblers import RandomPolicy, RandomSampler
from tests.tiny import VOCAB_SIZE

LONGEST = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def small_engine(folder: Path, rng: random.Random, method: str) -> Engine:
    page_size = rng.choice([1, 3, 4, 16])
    seqs = rng.choice([1, 3, 8])
    own = {"eagle": (2 * 2 * 8 + 32) * 8, "medusa": 32 * 8, "draft_model": 2 * 2 * 2 * 8 * 8, "self": 0}
    position = 2 * 2 * 2 * 8 * 8 + own[method_of(method)]
    pages = rng.randint(-(-60 // page_size) + 2, -(-160 // page_size) + 2)
    return Engine(
        EngineConfig(
            str(folder), dtype="float64", page_size=page_size, max_num_seqs=seqs,
            max_num_batched_tokens=rng.randint(seqs, 40), kv_cache_memory=pages * page_size * position,
            prefix_caching=rng.random() < 0.7, seed=0, self_check=False,
            speculation=Bet(method_of(method), kary(2, 3)), drafters={method_of(method): sources(folder)[method]},
        )
    )  # fmt: skip


def expected_outputs(folder: Path, requests: list[Request]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Every request by itself, without speculation, in an engine with room to spare."""
    engine = Engine(
        EngineConfig(str(folder), dtype="float64", speculation=None, prefix_caching=False, self_check=False)
    )
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for request in requests:
        engine.add(request)
        while engine.has_work:
            for delta in engine.step():
                choices = found.setdefault(request.id, {})
                choices[delta.choice] = (*choices.get(delta.choice, ()), *delta.tokens)
    return found


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        Request(
            str(number),
            prompt,
            SamplingParams(
                temperature=rng.choice([0, 1]), seed=number, n=rng.choice([1, 1, 1, 3]), ignore_eos=True,
                max_tokens=rng.randint(1, LONGEST), speculation=rng.choice(["auto", "off", "max"]),
                prompt_logprobs=rng.choice([None, None, None, 1]),
            ),
        )
        for number, prompt in enumerate(prompts_of(14, seed))
    ]  # fmt: skip
    expected = expected_outputs(folder, requests)
    method = ("eagle", "draft_model", "self", "medusa", "trained self")[seed % 5]
    engine, method = small_engine(folder, rng, method), method_of(method)
    others = [PromptLookup(), Suffix(kary(2, 2), shared=200, least=0.0), RandomSampler(VOCAB_SIZE, seed)]
    engine.drafters = Drafters([*engine.drafters.by_name.values(), *others])
    engine.policy = RandomPolicy(seed, [method, method, "prompt_lookup", "suffix", "random_sampler"])
    found: dict[str, dict[int, tuple[int, ...]]] = {request.id: {} for request in requests}
    scored: dict[str, int] = {}
    ended: dict[str, int] = {}
    aborted: set[str] = set()
    queue = list(requests)
    steps = 0
    while queue or engine.has_work:
        while queue and rng.random() < 0.4:
            engine.add(queue.pop(0))
        if rng.random() < 0.04:
            victim = rng.choice(requests)
            engine.abort(victim.id)
            if victim not in queue and ended.get(victim.id, 0) < victim.params.n:
                aborted.add(victim.id)
            engine.check_integrity()
        for delta in engine.step():
            assert delta.request_id not in aborted
            choices = found[delta.request_id]
            choices[delta.choice] = (*choices.get(delta.choice, ()), *delta.tokens)
            scored[delta.request_id] = scored.get(delta.request_id, 0) + len(delta.prompt_logprobs)
            ended[delta.request_id] = ended.get(delta.request_id, 0) + bool(delta.finish_reason)
        engine.check_integrity()
        steps += 1
        assert steps < 3000
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_pages
    assert not engine._streams
    for request in requests:
        if request.id in aborted:
            continue
        assert found[request.id] == expected[request.id]
        assert ended[request.id] == request.params.n
        if request.params.prompt_logprobs is not None:
            assert scored[request.id] == len(request.prompt) - 1


def test_a_request_that_can_never_fit_is_refused(folder: Path) -> None:
    engine = Engine(
        EngineConfig(
            str(folder), dtype="float64", kv_cache_memory=40 * 2 * 2 * 2 * 8 * 8, page_size=4, self_check=False
        )
    )
    for prompt, tokens, field in (((1,) * 10, 40, "max_tokens"), ((1,) * 128, 4, "prompt"), ((), 4, "prompt")):
        with pytest.raises(InvalidRequest) as error:
            engine.add(Request("r", prompt, SamplingParams(max_tokens=tokens)))
        assert error.value.param == field
    assert not engine.has_work
    engine.check_integrity()
