"""Replaying prompt lookup on known outputs tells what an engine that bets on it would have reported."""

from __future__ import annotations

import pytest

from parlay.bench.offline import Run, drive
from parlay.bench.replay import Replayed, replay
from parlay.bets import Tree, parse_bet
from parlay.config import EngineConfig
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.engine.engine import Engine
from parlay.types import SamplingParams, Speculation
from tests.tiny import make_tiny_llama

MAX_TOKENS = 60
TEXTS = ("the other and the other and the one of the", "a sea in a sea in a boat", "no repeats here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model")))


def decode(engine: Engine, wish: Speculation) -> tuple[list[tuple[int, ...]], Run]:
    prompts = [tuple(engine.tokenizer.encode(text)) for text in TEXTS]
    return prompts, drive(engine, prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, speculation=wish), 2)


@pytest.mark.parametrize("depth", [1, 4])
def test_replay_equals_the_engine(model: str, depth: int) -> None:
    bet = parse_bet(f"prompt_lookup:{depth}")
    engine = Engine(EngineConfig(model, dtype="float32", speculation=bet, self_check=False))
    prompts, plain = decode(engine, "off")
    _, bold = decode(engine, "auto")
    assert [output.tokens for output in bold.outputs] == [output.tokens for output in plain.outputs]
    assert sum(output.stats.accepted for output in bold.outputs) > 0
    drafter = PromptLookup(Tree.chain(depth))
    for prompt, known, real in zip(prompts, plain.outputs, bold.outputs, strict=True):
        earned = replay(drafter, prompt, known.tokens, MAX_TOKENS)
        stats = real.stats
        assert earned == Replayed(stats.steps, len(known.tokens), stats.drafted, stats.accepted)


def test_a_chain_is_accepted_up_to_the_first_difference() -> None:
    # After 1 2 the lookup says 3 4 5 9, and the output goes on with 3 4 7.
    earned = replay(PromptLookup(Tree.chain(4)), [1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 7], max_tokens=8)
    assert earned == Replayed(steps=1, tokens=3, drafted=4, accepted=2)


def test_branches_cover_two_continuations() -> None:
    prompt, output = [1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [3, 8, 5]
    assert replay(PromptLookup(Tree.chain(2)), prompt, output, max_tokens=8).steps == 2
    assert replay(PromptLookup(Tree((-1, 0, -1, 2))), prompt, output, max_tokens=8).steps == 1


def test_nothing_is_guessed_beyond_the_limit() -> None:
    earned = replay(PromptLookup(Tree.chain(4)), [1, 2, 3, 4, 1, 2], [3, 4], max_tokens=2)
    assert earned == Replayed(steps=1, tokens=2, drafted=1, accepted=1)
