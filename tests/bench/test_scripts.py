"""The arithmetic and the order of turns of the benchmark scripts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.one_request import ALL, Method, Trial, answer_all, choose, ours, summarise
from benchmarks.predicted_tokens import half, halve
from benchmarks.transformers_methods import PLAIN, load_methods
from benchmarks.trial import Answer, Estimate, WholeTrees, acceptance, covering, watch
from benchmarks.verification import read_tree
from parlay.bench.measuring import Counting, Counts, comb
from parlay.bench.workloads import Prompt
from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.policy.trees import child_ranks, expected_emitted, kary, overlap
from parlay.types import SamplingParams
from tests.tiny import make_tiny_llama

SHORT = Answer(first=1.0, whole=1.0, first_tokens=1, tokens=(5,), steps=1)
OFF = Answer(first=1.0, whole=5.0, first_tokens=1, tokens=(5, 6, 7, 8, 9), steps=5)
GUESSED = Answer(first=1.0, whole=3.0, first_tokens=1, tokens=(5, 6, 7, 8, 9), steps=2)
OTHER = Answer(first=1.0, whole=3.0, first_tokens=1, tokens=(5, 6, 7, 8, 1), steps=2)
BESIDE = {"off": "off", "bet": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def trials(*pairs: tuple[str, Answer, Answer], repeat: int = 0) -> list[Trial]:
    """Category, answer without guesses and with them, one prompt after the other."""
    return [
        Trial(number, category, 3, repeat, method, found)
        for number, (category, off, guessed) in enumerate(pairs)
        for method, found in (("off", off), ("bet", guessed))
    ]


# ---- one request ----------------------------------------------------------------------------------------------------


def test_a_category_that_only_made_first_tokens_tells_nothing_of_decoding() -> None:
    *_, found = summarise(trials(("short", SHORT, SHORT)), BESIDE, greedy=True)
    assert (found.category, found.method) == ("short", "bet")
    assert (found.decode, found.decode_ratio, found.decode_by_repeat, found.over_off) == (None,) * 4
    assert (found.whole_ratio.value, found.equal_outputs) == (1.0, 1)


def test_decoding_is_what_came_after_the_first_tokens() -> None:
    some = trials(("a", OFF, GUESSED), ("b", SHORT, SHORT)) + trials(("a", OFF, OTHER), ("b", SHORT, SHORT), repeat=1)
    found = {(score.category, score.method): score for score in summarise(some, BESIDE, greedy=True)}
    both = found[ALL, "bet"]
    assert both.decode_ratio is not None
    assert (found[ALL, "off"].decode, both.decode, both.decode_ratio.value) == (1.0, 2.0, 2.0)
    assert both.whole_ratio.value == pytest.approx(6 / 4)
    assert (both.tokens_per_step, both.requests, both.equal_outputs) == (2.0, 4, 3)
    assert found["a", "bet"].equal_outputs == 1
    assert next(iter(summarise(some, BESIDE, greedy=False))).equal_outputs is None


def test_all_methods_go_first_in_turn_and_begin_repeats_without_memories() -> None:
    said: list[str] = []

    def method(name: str) -> Method:
        def answer(prompt: tuple[int, ...], max_tokens: int) -> Answer:
            del prompt
            said.append(name if max_tokens == 99 else "warm-up")
            return SHORT

        return Method(name, "a", answer, lambda: said.append("forget"))

    prompts = [Prompt("all", "x")] * 3
    list(answer_all([method(name) for name in "abc"], prompts, [(1,)] * 3, 2, 99, lambda: None))
    assert said[:6] == ["warm-up"] * 3 + ["forget"] * 3
    assert "".join(said[6:15]) == "abcbcacab"
    assert said[15:18] == ["forget"] * 3
    assert "".join(said[18:]) == "bcacababc"


def test_prompts_are_chosen_by_category() -> None:
    prompts = [Prompt(name, str(number)) for name in "abc" for number in range(3)]
    chosen = choose(prompts, ["c", "a"], 2)
    assert [prompt.category + prompt.text for prompt in chosen] == ["c0", "a0", "c1", "a1"]
    with pytest.raises(SystemExit, match="there is no d, but a, b, c"):
        choose(prompts, ["d"], 1)


def test_transformers_and_parlay_say_the_same(folder: Path) -> None:
    """With all methods of both, and suffix decoding knows nothing of a repeat before."""
    settings: dict[str, Any] = {"dtype": "float32", "prefix_caching": False}
    engines = {name: Engine(EngineConfig(str(folder), speculation=bet, **settings)) for name, bet in (
        ("off", None), ("suffix:8", Bet("suffix", Tree.chain(8)))
    )}  # fmt: skip
    options = SimpleNamespace(model=str(folder), assistant=folder, temperature=0.0, drafter=["self=1"])
    theirs, left_out = load_methods(options, engines["off"])  # type: ignore[arg-type]
    assert not left_out
    names = [PLAIN, f"{PLAIN} lookup:10", f"{PLAIN} assistant", f"{PLAIN} exit:1"]
    assert [(name, beside) for name, beside, _ in theirs] == [(name, PLAIN) for name in names]
    methods = [*(ours(name, engine, 0.0) for name, engine in engines.items()), *(Method(*one) for one in theirs)]
    prompts = [Prompt("all", ""), Prompt("all", "")]
    found = list(answer_all(methods, prompts, [tuple(range(7, 40)), (5, 6, 5, 6)], 2, 24, lambda: None))
    beside = {method.name: method.beside for method in methods}
    scores = {score.method: score for score in summarise(found, beside, greedy=True) if score.category == ALL}
    assert {score.equal_outputs for score in scores.values()} == {4}
    steps = {(t.prompt, t.repeat): t.answer.steps for t in found if t.method == "suffix:8"}
    assert steps[0, 0] == steps[0, 1]
    assert scores["off"].tokens_per_step == scores[PLAIN].tokens_per_step == 1.0
    assert scores[f"{PLAIN} assistant"].tokens_per_step > 1.5  # it is the target itself
    assert all(0 < t.answer.first <= t.answer.whole and t.answer.first_tokens >= 1 for t in found)


# ---- trees ----------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_ratio_of_sums() -> None:
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        steps = chance.integers(10, 40, 30)
        emitted = steps + chance.binomial(steps, 0.5)
        found = Estimate.ratio(emitted.tolist(), steps.tolist())
        assert found.value == emitted.sum() / steps.sum()
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.5 <= found.high
    assert held >= 85
    assert Estimate.ratio([3, 4], [1, 1]) == Estimate(3.5)


def test_a_covering_tree_holds_each() -> None:
    trees = [Tree.chain(3), kary(2, 2), Tree((-1, 0, 0, 0, -1, -1))]
    whole = covering(trees)
    assert len(whole) < sum(map(len, trees))
    for tree in trees:
        assert len(overlap(whole, tree)) == len(tree)


def test_rare_levels_share_a_row() -> None:
    counts = Counts(np.array([[300.0, 100, 100], [200, 50, 50], [40, 20, 40], [20, 0, 20]]))
    assert acceptance(counts, 200).tolist() == [[0.6, 0.2], [200 / 300, 50 / 300], [60 / 140, 20 / 140]]
    assert acceptance(counts, 1).shape == (4, 2)


def test_whole_trees_tell_their_own_acceptance(folder: Path) -> None:
    """Along a chain it accounts for every token; steps with less than the tree are left out."""
    chain = Bet("self", Tree.chain(3))
    config = EngineConfig(str(folder), dtype="float32", speculation=chain, drafters={"self": "1"}, seed=0)
    engine = Engine(config)
    prompts = [tuple(range(start, start + 9)) for start in range(6)]
    params = SamplingParams(temperature=1.0, max_tokens=21, ignore_eos=True)
    found = watch(engine, lambda: WholeTrees("self", chain.tree), prompts, params, 2)
    assert len(found) == 6
    assert all(one.others >= 2 for one in found)  # the prompt's own step, and one by the limit
    counts = [np.array([[3.0, 1, 2], [2, 0, 1], [1, 0, 1]])] * 6
    summed = half(chain.tree, counts, found)
    assert summed.own_error == pytest.approx(0)
    assert 1 < summed.over_all_steps < summed.tokens_per_step.value < 4
    assert sum(one.emitted + one.other_emitted for one in found) == 6 * 21
    assert summed.error.value == pytest.approx((1 + 0.5 + 0.25 + 0.125) / summed.tokens_per_step.value - 1, abs=0.2)
    watched = watch(engine, lambda: Counting("self", comb(1, 3), 1), prompts, params, 3)
    assert all(one.counts.trials[0] > 0 for one in watched)


def test_a_right_drafter_is_predicted_exactly(folder: Path) -> None:
    tree = kary(2, 2)
    config = EngineConfig(
        str(folder), dtype="float32", speculation=Bet("draft_model", tree), drafters={"draft_model": str(folder)}
    )
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    found = watch(Engine(config), lambda: WholeTrees("draft_model", tree), [(5, 6, 7)] * 6, params, 3)
    counts = [np.array([[9.0, 0, 0], [9, 0, 0]])] * 6
    summed = half(tree, counts, found)
    assert f"{summed.tokens_per_step:.2f}" == "3.00 (3.00..3.00)"
    assert f"{summed.error:+.1%}" == "+0.0% (+0.0%..+0.0%)"


def test_how_trees_are_written() -> None:
    vector = np.array([[0.7, 0.2]])
    assert read_tree("2^3", vector) == kary(2, 3)
    assert read_tree("[-1,-1,0]", vector) == Tree((-1, -1, 0))
    best = read_tree("3x2", vector)
    assert expected_emitted(best, vector[0]) == pytest.approx(1 + 0.7 + 0.49 + 0.2)
    assert child_ranks(best).max() == 1
    for wrong in ("", "3", "0x2", "[0]", "2*3"):
        with pytest.raises(ValueError):  # noqa: PT011  (several kinds, all told as one)
            read_tree(wrong, vector)


def test_halves_have_every_category() -> None:
    prompts = [Prompt(name, str(number)) for number in range(4) for name in "ab"]
    one, other = halve(prompts)
    assert sorted(prompt.category for prompt in one) == sorted(prompt.category for prompt in other) == list("aabb")
    assert not set(one) & set(other)
    assert len(one) + len(other) == 8
    assert [len(some) for some in halve(prompts[:5])] == [2, 2]


def test_every_peer_goes_first_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "peers"))
    compare: Any = importlib.import_module("benchmarks.peers.compare")
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(compare, "take_turn", lambda worker, prompts, _: asked.append((len(prompts), worker.about)))
    workers = [SimpleNamespace(about=name) for name in "ab"]
    turns = compare.take_turns(workers, [(1,)] * 2, (1, 2), 8, 2)
    assert {place: len(found) for place, found in turns.items()} == {(w, b): 2 for w in "ab" for b in (1, 2)}
    assert sorted(asked[:: len(workers)]) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
