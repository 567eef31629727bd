"""A drafter that raises is switched off for good; no request is lost, and its output does not change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from parlay.bets import Tree
from parlay.drafters.base import Drafters
from parlay.drafters.draft_model import DraftModel
from parlay.drafters.eagle import Eagle
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.engine.engine import Engine
from parlay.server.metrics import Metrics
from parlay.types import Request, SamplingParams
from tests.architectures import make_model, prompts_of
from tests.drafting import engine_with, method_of
from tests.gamblers import RandomPolicy

pytestmark = pytest.mark.failures

PROMPTS = [tuple([7, 8, 9] * 5), *prompts_of(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def outputs(engine: Engine, **params: Any) -> Mapping[str, Sequence[int]]:
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=16, ignore_eos=True, **params)))
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
        engine.check_integrity()
    return found


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3}], ids=["greedy", "coupled"])
@pytest.mark.parametrize("method", ["eagle", "medusa", "draft_model", "self", "trained self"])
@pytest.mark.parametrize("verb", ["offer", "draft", "forward", "commit", "forget", "garbage", "too much"])
def test_nothing_is_lost(
    folder: Path, method: str, verb: str, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine, method = engine_with(folder, method), method_of(method)
    (drafter,) = engine.drafters.by_name.values()
    engine.drafters = Drafters([drafter, PromptLookup(Tree.chain(3))])
    engine.policy = RandomPolicy(0, [method, "prompt_lookup"])
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            if verb == "garbage":
                return [None] * 99
            if verb == "too much":
                return [type("Draft", (), {"tree": Tree.chain(50)})()] * len(args[0])
            raise RuntimeError("the wheel fell off")
        return honest(*args)

    name = "draft" if verb in ("garbage", "too much") else verb
    honest = getattr(drafter, name)
    setattr(drafter, name, failing)
    plain = engine_with(folder, "self")
    plain.drafters = Drafters([])
    plain.policy = RandomPolicy(0, ["nobody"])
    assert outputs(engine, **params) == outputs(plain, **params)
    assert engine.drafters.failed == (method,)
    assert engine.status().failed_drafters == (method,)
    assert list(engine.drafters.by_name) == ["prompt_lookup"]
    assert f"drafter {method} failed and is switched off" in caplog.text
    text = Metrics("m", engine.status).write("")[0].decode()
    assert f'parlay:spec_decode_drafter_failures_total{{method="{method}",model_name="m"}} 1.0' in text
    assert calls == 5, "it is never asked again"


@pytest.mark.parametrize("method", ["eagle", "draft_model"])
def test_its_memory_is_given_back(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a server's objects are frozen, which no garbage collection looks at."""
    monkeypatch.setattr("parlay.drafters.base.logger.disabled", True)  # pytest keeps what is logged, with its frames
    engine = engine_with(folder, method)
    (drafter,) = engine.drafters.by_name.values()
    assert isinstance(drafter, Eagle | DraftModel)
    weights = drafter.head if isinstance(drafter, Eagle) else drafter._loaded.model
    held = [weakref.ref(some) for some in (*weights.parameters(), *weights.buffers())]
    assert len(held) > 5

    def failing(*args: Any) -> Any:
        raise RuntimeError("the wheel fell off")

    drafter.draft = failing  # type: ignore[method-assign]
    del drafter, weights
    gc.collect()
    gc.disable()
    try:
        outputs(engine, temperature=0)
    finally:
        gc.enable()
    assert engine.drafters.failed == (method,)
    assert not [some() for some in held if some() is not None]
    assert len(engine.model.kv.pools) == len(engine.model.kv.slots) == len(engine.model.kv.keys), "features are gone"
