"""Trees that grow where they are likely to be right take in what others show."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parlay.bets import Bet, Tree, likely_tree
from parlay.config import EngineConfig
from parlay.drafters.base import ShownGuesses
from parlay.drafters.growing import Growth, Hint
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
    found = grown(Growth(row_of(), bet, (), Hint.of([chain])), {4: 0.5, 5: 0.25})
    assert found[9,] == pytest.approx(0.9)
    assert found[9, 4] == pytest.approx(0.81), "its own guess, of which another is surer"
    assert found[9, 4, 9] == pytest.approx(0.729)
    assert (4,) in found
    assert found[9, 4, 4] == pytest.approx(0.405), "it goes on behind others' guesses"


def test_planned_shapes_and_samples_stay_as_they_were() -> None:
    hint = Hint.of([Offer("shown", Tree.chain(1), (9,), (0.9,))])
    for row, bet in (
        (row_of(), Bet("some", Tree((-1, -1)))),
        (row_of(SamplingParams(temperature=1)), Bet("some", Tree((-1, -1)), free=True)),
    ):
        growth = Growth(row, bet, (), hint)
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
    growth = Growth(row_of(), bet, (), Hint.of([offer]))
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


def test_a_head_that_is_told_the_answer_verifies_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    config = EngineConfig(
        str(folder), speculation=Bet("eagle", likely_tree(8, 4)), drafters={"eagle": sources(folder)["eagle"]},
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

    engine.policy = Fixed("eagle", likely_tree(8, 4), free=True)
    plain, slow = answers()
    engine.drafters.by_name["prophet"] = Prophet(dict(zip(prompts, plain, strict=True)))
    told, fast = answers()
    assert told == plain
    assert fast <= 2 + int(np.ceil(20 / 5)) < slow
    assert not engine.drafters.failed
