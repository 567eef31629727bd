"""Trees that grow where they are likely to be right take in what others show."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from parlay.bets import Bet, Tree, likely_tree
from parlay.config import EngineConfig
from parlay.drafters.base import ShownGuesses
from parlay.drafters.growing import Growth, Hint, draw_children
from parlay.engine.engine import Engine
from parlay.policy.fixed import Fixed
from parlay.types import Offer, Request, Row, SamplingParams
from tests.architectures import make_model, prompts_of
from tests.drafting import sources

GREEDY = SamplingParams(temperature=0)


def row_of(params: SamplingParams = GREEDY) -> Row:
    return Row(0, Request("0", (1, 2), params), 0, array("i", [1, 2]), 2, 1, 1, 0, 9, [])


def paths(tree: Tree, tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens that lead to each node."""
    found: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents, tokens, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def grown(growth: Growth, guesses: dict[int, float]) -> dict[tuple[int, ...], float]:
    """Lets a drafter that says the same behind every node grow a tree to its end: survival by path."""
    while growth.frontier:
        first = len(growth.tokens)
        for node in growth.frontier:
            some = list(guesses.items())[: growth.branches(node)]
            growth.add(node, [token for token, _ in some], [share for _, share in some])
        growth.advance(first)
    tree, tokens = (draft := growth.draft("some", None)).tree, draft.tokens
    everywhere = paths(Tree(tuple(growth.parents)), growth.tokens)
    assert len(set(everywhere)) == len(everywhere), "siblings are different tokens"
    survival = dict(zip(everywhere, growth.survival, strict=True))
    kept = paths(tree, tokens)
    assert len(kept) <= len(growth.planned)
    assert tree.depth <= growth.planned.depth
    for parent in {-1, *growth.parents}:
        siblings = [growth.survival[node] for node, other in enumerate(growth.parents) if other == parent]
        assert siblings == sorted(siblings, reverse=True), "acceptance is learnt by rank"
    left = [value for path, value in survival.items() if path not in set(kept)]
    assert not left or min(survival[path] for path in kept) >= max(left)
    return {path: survival[path] for path in kept}


def test_what_several_show_is_one_tree() -> None:
    one = Offer("a", Tree((-1, 0, 0)), (5, 6, 7), (0.5, 0.4, 0.2))
    other = Offer("b", Tree((-1, -1, 0)), (5, 8, 6), (0.25, 0.125, 0.75))
    root = Hint.of([one, other])
    assert {token: hint.share for token, hint in root.after.items()} == {5: 0.5, 8: 0.125}
    assert {token: hint.share for token, hint in root.after[5].after.items()} == {6: 0.75, 7: 0.2}


def test_others_guesses_compete_with_its_own() -> None:
    chain = Offer("shown", Tree.chain(3), (9, 4, 9), (0.9, 0.9, 0.9))
    bet = Bet("some", likely_tree(6, 3), free=True)
    alone = grown(Growth(row_of(), bet, ()), {4: 0.5, 5: 0.25})
    assert (4, 4, 4) in alone
    found = grown(Growth(row_of(), bet, (), [chain]), {4: 0.5, 5: 0.25})
    assert found[9,] == pytest.approx(0.9)
    assert found[9, 4] == pytest.approx(0.81), "its own guess, of which another is surer"
    assert found[9, 4, 9] == pytest.approx(0.729)
    assert (4,) in found
    assert found[9, 4, 4] == pytest.approx(0.405), "it goes on behind others' guesses"


def test_of_two_estimates_the_higher_one_counts() -> None:
    bet = Bet("some", likely_tree(2, 1), free=True)
    found = grown(Growth(row_of(), bet, (), [Offer("shown", Tree.chain(1), (4,), (0.1,))]), {4: 0.5, 5: 0.25})
    assert found == {(4,): 0.5, (5,): 0.25}


def test_a_single_guess_is_the_likeliest_one() -> None:
    """Of what the drafter and others hold to be likely, whoever else is in the step."""
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    bet, shown = Bet("some", Tree.chain(1), free=True), [Offer("shown", Tree.chain(1), (6,), (0.9,))]
    drafts = []
    for offers in ([], shown):
        growth = Growth(row_of(), bet, (), offers)
        draw_children([growth], logits, None, torch.Generator(), "sequoia")
        drafts.append(growth.draft("some", None).tokens)
    assert drafts == [(1,), (6,)]


def test_what_is_hardly_likely_is_never_sampled() -> None:
    bet = Bet("some", Tree((-1, -1)))
    growth = Growth(row_of(SamplingParams(temperature=1)), bet, ())
    draw_children([growth], torch.tensor([[0.0, -90.0, -1.0, -90.0]]), None, torch.Generator(), "sequoia")
    assert growth.probs[0].count_nonzero() == 2
    assert {*growth.tokens} == {0, 2}


def test_planned_shapes_and_samples_stay_as_they_were() -> None:
    shown = [Offer("shown", Tree.chain(1), (9,), (0.9,))]
    for row, bet in (
        (row_of(), Bet("some", Tree((-1, -1)))),
        (row_of(SamplingParams(temperature=1)), Bet("some", Tree((-1, -1)), free=True)),
        (row_of(SamplingParams(temperature=1, seed=3)), Bet("some", Tree((-1, -1)), free=True)),
    ):
        growth = Growth(row, bet, (), shown)
        growth.add(-1, [4, 5], [0.5, 0.25])
        growth.advance(0)
        assert growth.draft("some", None).tokens == (4, 5)


@given(st.data())
def test_the_likeliest_of_all_are_kept(data: Any) -> None:
    share = st.floats(0.01, 1)
    guesses = data.draw(st.dictionaries(st.integers(0, 5), share, min_size=1, max_size=4))
    guesses = dict(sorted(guesses.items(), key=lambda item: -item[1]))
    parents = data.draw(st.integers(0, 8).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n)))))
    tokens, taken = [], set()
    for parent in parents:
        token = next(t for t in data.draw(st.permutations(range(9))) if (parent, t) not in taken)
        taken.add((parent, token))
        tokens.append(token)
    sure = data.draw(st.lists(share, min_size=len(parents), max_size=len(parents)))
    offer = Offer("shown", Tree(parents), tuple(tokens), tuple(sure))
    size = data.draw(st.integers(1, 12))
    bet = Bet("some", likely_tree(size, data.draw(st.integers(1, min(size, 4)))), free=True)
    growth = Growth(row_of(), bet, (), [offer])
    grown(growth, guesses)
    shown = {path for path in paths(offer.tree, offer.tokens or ()) if len(path) <= growth.planned.depth}
    assert shown <= set(paths(Tree(tuple(growth.parents)), growth.tokens)), "all of them were looked at"


class Prophet(ShownGuesses):
    """Knows how every text goes on."""

    name = "prophet"

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        super().__init__(Tree.chain(4))
        self.answers = answers

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        prompt = row.request.prompt
        rest = self.answers[prompt][row.length - len(prompt) :][: min(4, row.max_depth)]
        return Offer(self.name, Tree.chain(len(rest)), rest, (0.99,) * len(rest)) if rest else None


class Rumour(Prophet):
    """Says the same and not how sure it is."""

    name = "rumour"

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        offer = super().guess(row)
        return None if offer is None else Offer(self.name, offer.tree, offer.tokens)


class Stranger(ShownGuesses):
    """Is sure of a token that only the target has."""

    name = "stranger"

    def __init__(self, token: int) -> None:
        super().__init__(Tree.chain(2))
        self.token = token

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        return Offer(self.name, self.tree, (self.token, self.token), (0.99, 0.99)) if row.max_depth > 1 else None


def test_a_draft_model_is_not_led_behind_tokens_that_it_lacks(tmp_path: Path) -> None:
    target, draft = make_model(tmp_path / "target", "llama"), make_model(tmp_path / "draft", "llama", layers=1)
    wide = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    wide.resize_token_embeddings(wide.config.vocab_size + 9)
    wide.save_pretrained(target)
    config = EngineConfig(
        str(target), speculation=Bet("draft_model", likely_tree(8, 4)), drafters={"draft_model": str(draft)},
        dtype="float64", seed=0, self_check=False,
    )  # fmt: skip
    engine = Engine(config)
    engine.drafters.by_name["stranger"] = Stranger(engine.model.vocab_size - 1)
    engine.policy = Fixed("draft_model", likely_tree(8, 4), free=True)
    engine.add(Request("0", (1, 2, 3), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert not engine.drafters.failed


@pytest.mark.parametrize("drafter", ["eagle", "medusa"])
def test_a_head_that_is_told_the_answer_verifies_it(drafter: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    config = EngineConfig(
        str(folder), speculation=Bet(drafter, likely_tree(8, 4)), drafters={drafter: sources(folder)[drafter]},
        dtype="float64", seed=0, self_check=False,
    )  # fmt: skip
    prompts = [tuple(prompt) for prompt in prompts_of(4)]
    engine = Engine(config)

    def answers() -> tuple[list[tuple[int, ...]], int]:
        for number, prompt in enumerate(prompts):
            engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)))
        said: dict[str, tuple[int, ...]] = {str(number): () for number in range(len(prompts))}
        steps = 0
        while engine.has_work:
            steps += 1
            for delta in engine.step():
                said[delta.request_id] += delta.tokens
        return list(said.values()), steps

    engine.policy = Fixed(drafter, likely_tree(8, 4), free=True)
    plain, slow = answers()
    engine.drafters.by_name["rumour"] = Rumour(dict(zip(prompts, plain, strict=True)))
    assert answers() == (plain, slow), "who does not know how likely its guesses are is not heard"
    engine.drafters.by_name["prophet"] = Prophet(dict(zip(prompts, plain, strict=True)))
    told, fast = answers()
    assert told == plain
    assert fast <= 2 + int(np.ceil(20 / 5)) < slow
    assert not engine.drafters.failed
