"""Drafters that run a model: what they guess is what that model says, whatever happened to their pages before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parlay.bets import Bet, Tree, likely_tree, parse_bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.eagle import Eagle
from parlay.drafters.growing import BRANCH, WIDTH
from parlay.drafters.levels import LEAST, LevelDrafter
from parlay.engine.engine import Engine
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.trees import expected_emitted, kary
from parlay.types import Request, SamplingParams, SpeculationStats, StepPlan
from tests.architectures import make_model, plain_model, prompts_of
from tests.drafting import engine_with, method_of
from tests.gamblers import RandomPolicy
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def finish(engine: Engine, prompts: list[tuple[int, ...]], **params: Any) -> dict[str, SpeculationStats]:
    """What speculation did for each prompt."""
    found = {str(number): SpeculationStats() for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | params)))
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.stats
        engine.check_integrity()
    return found


@pytest.mark.parametrize(
    "params", [GREEDY, {"seed": 7, "top_k": 40}, {"verification": "optimal"}], ids=["greedy", "coupled", "optimal"]
)
@pytest.mark.parametrize("budget", [512, 40], ids=["whole", "chunked"])
def test_a_draft_model_that_is_the_target_is_always_right(folder: Path, params: dict[str, Any], budget: int) -> None:
    """In each mode: the same tokens, the same noise, or the same distribution, in a batch with reuse and chunks."""
    engine = engine_with(folder, "draft_model", Tree.chain(4), max_num_batched_tokens=budget, page_size=4)
    for stats in finish(engine, prompts_of(8), **params).values():
        assert stats.accepted == stats.drafted >= 10
    engine = engine_with(folder, "draft_model", kary(2, 3), max_num_batched_tokens=512, page_size=4)
    for stats in finish(engine, prompts_of(8), **params).values():
        assert stats.steps <= 2 + -(-20 // 4)


@pytest.mark.parametrize(
    "params", [GREEDY, {"seed": 7}, {"verification": "optimal"}], ids=["greedy", "coupled", "optimal"]
)
@pytest.mark.parametrize("tree", [Tree.chain(4), kary(2, 3)], ids=["chain", "tree"])
def test_an_end_that_may_not_come_yet_is_not_guessed(folder: Path, params: dict[str, Any], tree: Tree) -> None:
    """The draft model that is the target is right again, although both would say the end at once if they could."""
    engine = engine_with(folder, "draft_model", tree)
    (end,) = engine.eos[:1]
    stops = tuple(range(100, 200))
    limits = {"min_tokens": 20, "ignore_eos": False, "logit_bias": {end: 30.0}, "stop_token_ids": stops} | params
    for stats in finish(engine, prompts_of(8), **limits).values():
        assert stats.steps <= 2 + -(-20 // (tree.depth + 1))


def test_an_end_that_a_drafter_does_not_know(folder: Path) -> None:
    """A head's vocabulary is reduced; what is forbidden may lie beyond it."""
    engine = engine_with(folder, "eagle", kary(2, 3))
    stats = finish(engine, prompts_of(4), min_tokens=20, stop_token_ids=(VOCAB_SIZE - 1,), temperature=0)
    assert all(some.drafted for some in stats.values())
    assert not engine.drafters.failed


class Switching(RandomPolicy):
    """Bets in some steps only, so that the drafter falls behind."""

    def plan(self, rows: Any, offers: Any, budget: int) -> StepPlan:
        plan = super().plan(rows, offers, budget)
        return plan if self._rng.random() < 0.5 else StepPlan((None,) * len(rows))


@pytest.mark.parametrize("method", ["eagle", "medusa", "draft_model", "self", "trained self"])
@pytest.mark.parametrize("seed", range(4))
def test_guesses_do_not_depend_on_what_happened_to_the_pages(folder: Path, method: str, seed: int) -> None:
    """Under preemption, prefix hits, forks and spells of being off, a draft is the one that a fresh engine makes."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4])
    own = {"eagle": (2 * 2 * 8 + 32) * 8, "medusa": 32 * 8, "draft_model": 2 * 2 * 2 * 8 * 8, "self": 0}
    position = 2 * 2 * 2 * 8 * 8 + own[method_of(method)]
    engine = engine_with(
        folder, method, page_size=page_size, max_num_seqs=4, max_num_batched_tokens=24,
        kv_cache_memory=position * page_size * (2 + 70 // page_size),
    )  # fmt: skip
    engine.policy = Switching(seed, [method_of(method)])
    drafts = _note_drafts(engine.drafters)
    for number, prompt in enumerate(prompts_of(10, seed)):
        params = SamplingParams(max_tokens=rng.randint(4, 24), ignore_eos=True, temperature=0, n=rng.choice([1, 1, 2]))
        engine.add(Request(str(number), prompt, params))
        engine.step()
    while engine.has_work:
        engine.step()
    assert engine.scheduler.preemptions
    assert len(drafts) > 20
    fresh = engine_with(folder, method, prefix_caching=False)
    compared = 0
    for text, bet, guesses in rng.sample(drafts, 20):
        expected = _fresh_draft(fresh, text, bet)
        assert expected in (None, guesses)
        compared += expected is not None
    assert compared > 12


def _note_drafts(drafters: Drafters) -> list[tuple[tuple[int, ...], Bet, tuple[Tree, tuple[int, ...]]]]:
    """Every draft that is made: behind which tokens, for which bet, and the guesses."""
    (drafter,) = drafters.by_name.values()
    noted, draft = [], drafter.draft

    def noting(rows: Any, bets: Any, budget: int) -> Any:
        drafts = draft(rows, bets, budget)
        for row, bet, some in zip(rows, bets, drafts, strict=True):
            if some is not None:
                noted.append((tuple(row.tokens[: row.length]), bet, (some.tree, some.tokens)))
        return drafts

    drafter.draft = noting  # type: ignore[method-assign]
    return noted


def _fresh_draft(engine: Engine, text: tuple[int, ...], bet: Bet) -> tuple[Tree, tuple[int, ...]] | None:
    """What the drafter guesses behind a text that nothing was known of before."""
    noted = _note_drafts(engine.drafters)
    engine.policy = _Always(bet)
    # Heads do not guess beside a prompt, so the last token is left to the target; None where that is not what it says.
    prompt = text[:-1] if "draft_model" not in engine.drafters.by_name else text
    engine.add(Request("fresh", prompt, SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)))
    while engine.has_work and not any(found == text for found, _, _ in noted):
        engine.step()
    engine.abort("fresh")
    return next((guesses for found, _, guesses in noted if found == text), None)


class _Always:
    """Makes the same bet on every row that it is offered for."""

    def __init__(self, bet: Bet) -> None:
        self._bet = bet

    def plan(self, rows: Any, offers: Any, budget: int) -> StepPlan:
        return StepPlan(tuple(self._bet if some else None for some in offers))

    def observe(self, rows: Any, result: Any) -> None:
        pass


def test_catching_up_stays_within_the_token_budget(folder: Path) -> None:
    engine = engine_with(folder, "draft_model", Tree.chain(2), max_num_batched_tokens=64, max_num_seqs=4)
    read = _note_reading(engine)
    prompts = [tuple(range(3, 103)), (5, 6, 7)]
    found = finish(engine, prompts, **GREEDY)
    assert all(stats.accepted == stats.drafted > 0 for stats in found.values())
    assert sum(missed for _, missed in read) > 100
    assert all(missed <= max(LEAST, 64 - known) for known, missed in read)
    assert max(missed for _, missed in read) > 50, "it takes what it can get"


def test_catching_up_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step has next to nothing left, and where other rows' own guesses leave much to read."""
    engine = engine_with(folder, "draft_model", Tree.chain(2), max_num_batched_tokens=5, max_num_seqs=4)
    engine.policy = _Always(Bet("draft_model", Tree.chain(2)))
    found = finish(engine, [tuple(range(3, 63)), (4, 5), (6, 7), (8, 9)], max_tokens=60, **GREEDY)
    assert found["0"].accepted > 10
    monkeypatch.setattr("parlay.drafters.levels.LEAST", 4)
    engine = engine_with(folder, "draft_model", Tree.chain(1), max_num_batched_tokens=18, max_num_seqs=9)
    found = finish(engine, [*((3, 4, 5 + i) for i in range(8)), tuple(range(3, 63))], max_tokens=50, **GREEDY)
    assert found["8"].accepted > 5


def _note_reading(engine: Engine) -> list[tuple[int, int]]:
    """Per step, how many known tokens the target reads, and how many the drafter reads of rows that are behind."""
    (drafter,) = engine.drafters.by_name.values()
    assert isinstance(drafter, LevelDrafter)
    noted, draft, forward = [], drafter.draft, drafter.forward
    behind = 0

    def drafting(rows: Any, bets: Any, budget: int) -> Any:
        nonlocal behind
        behind = 0
        drafts = draft(rows, bets, budget)
        noted.append((engine.config.max_num_batched_tokens - budget, behind))
        return drafts

    def passing(batch: Any, parents: Any) -> Any:
        nonlocal behind
        if parents is None:
            behind = sum(row.count for row in batch.rows if row.count > drafter.tree.depth + 1)
        return forward(batch, parents)

    drafter.draft, drafter.forward = drafting, passing  # type: ignore[method-assign]
    return noted


def test_a_free_tree_grows_where_it_is_likely(folder: Path) -> None:
    """All nodes of the whole tree, as far as it is expanded, by their probability along the path; brute force."""
    engine = engine_with(folder, "draft_model", likely_tree(9, 3))
    engine.policy = _Always(Bet("draft_model", likely_tree(9, 3), free=True))
    drafts = _note_drafts(engine.drafters)
    prompt = (3, 1, 4, 1, 5, 9)
    engine.add(Request("r", prompt, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)))
    engine.step()
    ((text, _, (tree, tokens)),) = drafts
    plain = plain_model(folder)
    level: dict[tuple[int, ...], float] = {(): 1.0}
    whole: dict[tuple[int, ...], float] = {}
    for _ in range(3):
        expanded = sorted(level, key=lambda path: -level[path])[:WIDTH]
        level = {}
        for path in expanded:
            with torch.inference_mode():
                best = plain(input_ids=torch.tensor([[*text, *path]])).logits[0, -1].softmax(-1).topk(BRANCH)
            for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                level[*path, token] = ({(): 1.0} | whole)[path] * chance
        whole |= level
    paths: list[tuple[int, ...]] = []
    for node in range(len(tree)):
        parent = tree.parents[node]
        paths.append((*(paths[parent] if parent >= 0 else ()), tokens[node]))
    assert set(paths) == set(sorted(whole, key=lambda path: -whole[path])[:9])


def test_trees_by_size_and_depth() -> None:
    """They are those of the dynamic program for the same odds."""
    chances = np.array([0.6 / 4**child for child in range(8)])
    for size, depth in ((1, 1), (5, 2), (16, 6), (24, 8)):
        tree = parse_bet(f"eagle:{size}x{depth}")
        assert isinstance(tree, Bet)
        assert tree.free
        assert (len(tree.tree), tree.tree.depth <= depth) == (size, True)
        best = OptimalTrees(chances, size, depth).tree(size, depth)
        assert expected_emitted(tree.tree, chances) == pytest.approx(expected_emitted(best, chances))
    for text in ("eagle:3x4", "eagle:0x0", "eagle:3x"):
        with pytest.raises(ValueError, match="write off, auto"):
            parse_bet(text)


def test_a_draft_model_with_less_context_and_fewer_tokens(folder: Path, tmp_path: Path) -> None:
    """It guesses as far as it can, rows that it cannot read get no guesses, and it is not switched off."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE - 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=24, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).double().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bet = Bet("draft_model", Tree.chain(4))
    options: dict[str, Any] = {"speculation": bet, "drafters": {"draft_model": str(tmp_path)}, "self_check": False}
    engine = Engine(EngineConfig(str(folder), dtype="float64", **options))
    drafts = _note_drafts(engine.drafters)
    found = finish(engine, [(3,) * 10, (3, VOCAB_SIZE - 1, 4)], temperature=0)
    assert not engine.drafters.failed
    assert max(len(text) + len(tree) for text, _, (tree, _) in drafts) == 24
    assert found["0"].drafted
    assert not found["1"].drafted


@pytest.mark.parametrize("length", [40, 70])
def test_a_head_that_leaves_out_most_of_a_prompt_writes_what_it_would_have_written(folder: Path, length: int) -> None:
    """Keys know their place in the text, so rows that left out different pages may share those they both read."""
    rng = random.Random(length)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))
    keys, tokens, read = [], [], []
    for window in (None, 8):
        engine = engine_with(folder, "eagle", Tree.chain(2), page_size=4, compile="off")
        drafter = engine.drafters.by_name["eagle"]
        assert isinstance(drafter, Eagle)
        drafter.window = window
        engine.add(Request("a", prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
        emitted: list[int] = []
        while engine.has_work:
            if len(emitted) > 12 and len(keys) == len(tokens):
                (seq,) = engine.scheduler.running
                first = drafter.coverage.first_page(engine.scheduler._row(seq, 1))
                read.append(first)
                places = range(max(4 * first + 1, length - 3), length + 6)  # the first of all has no feature before it
                slots = [seq.pages[place // 4] * 4 + place % 4 for place in places]
                keys.append(drafter._kv.slots[0][torch.tensor(slots)].clone())
            emitted += [token for delta in engine.step() for token in delta.tokens]
        tokens.append(emitted)
    assert tokens[0] == tokens[1]
    assert read == [0, (length - 8) // 4]
    torch.testing.assert_close(keys[0], keys[1])
