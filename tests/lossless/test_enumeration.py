"""Every verification mode is exact: the law of what is emitted equals the target's own, to rounding.

The production acceptor is driven through every branch of its chance, and a drafter through every tree it could have
drawn. Emitted tokens are then continued from the target, so that outcomes of different lengths can be compared with
the target's law over sequences of one length.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from parlay.bets import Tree
from parlay.engine.accept import Acceptor, Scores
from parlay.engine.batch import Draft
from parlay.types import Request, Row, SamplingParams
from tests.lossless.explore import ExhaustiveDraws

Law = Callable[[tuple[int, ...]], torch.Tensor]  # the next token's distribution after a path
TREES = {
    "root": Tree(()),
    "chain1": Tree.chain(1),
    "chain3": Tree.chain(3),
    "pair": Tree((-1, -1)),
    "three": Tree((-1, -1, -1)),
    "bush": Tree((-1, -1, 0, 0, 1)),
    "broom": Tree((-1, 0, 0, 2)),
}


def random_law(seed: int, vocab: int, support: int | None = None) -> Law:
    """A different random distribution after every path, on `support` tokens at most."""
    known: dict[tuple[int, ...], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def law(path: tuple[int, ...]) -> torch.Tensor:
        if path not in known:
            probs = torch.rand(vocab, dtype=torch.float64, generator=generator) ** 2
            probs[torch.randperm(vocab, generator=generator)[support or vocab :]] = 0
            known[path] = probs / probs.sum()
        return known[path]

    return law


def drawn_children(probs: torch.Tensor, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All ordered draws of `count` children without replacement; uniform over the rest once the mass is used up."""
    if not count:
        yield (), 1.0
        return
    for first in range(len(probs)):
        if probs[first] > 0:
            left = probs.clone()
            left[first] = 0
            yield from _then(first, float(probs[first]), left, {first}, count - 1)


def _then(
    first: int, weight: float, left: torch.Tensor, taken: set[int], count: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    if not count:
        yield (first,), weight
        return
    if left.sum() > 0:
        left = left / left.sum()
    else:
        left = torch.tensor([float(t not in taken) for t in range(len(left))], dtype=left.dtype)
        left = left / left.sum()
    for token in range(len(left)):
        if left[token] > 0:
            rest = left.clone()
            rest[token] = 0
            for tail, share in _then(token, float(left[token]), rest, taken | {token}, count - 1):
                yield (first, *tail), weight * share


def path_to(tree: Tree, tokens: tuple[int, ...], node: int) -> tuple[int, ...]:
    return () if node < 0 else (*path_to(tree, tokens, tree.parents[node]), tokens[node])


def independent_children(probs: torch.Tensor, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All ordered draws of `count` children with replacement."""
    for values in itertools.product(range(len(probs)), repeat=count):
        weight = float(probs[list(values)].prod())
        if weight > 0:
            yield values, weight


def sampled_drafts(
    tree: Tree, proposal: Law, replaced: bool = False, ids: tuple[int, ...] | None = None
) -> Iterator[tuple[Draft, float]]:
    """Every tree of values that a sampling drafter could draw, with its probability; it may know some tokens only."""
    draws = independent_children if replaced else drawn_children
    children = tree.children()

    def fill(inner: list[int], tokens: dict[int, int]) -> Iterator[tuple[dict[int, int], float]]:
        if not inner:
            yield tokens, 1.0
            return
        node, *rest = inner
        path = path_to(tree, tuple(tokens.get(i, -1) for i in range(len(tree))), node)
        for values, weight in draws(proposal(path), len(children[node])):
            values = values if ids is None else tuple(ids[value] for value in values)
            chosen = tokens | dict(zip(children[node], values, strict=True))
            for filled, share in fill(rest, chosen):
                yield filled, weight * share

    inner = sorted(children)
    for filled, weight in fill(inner, {}):
        tokens = tuple(filled[i] for i in range(len(tree)))
        probs = torch.stack([proposal(path_to(tree, tokens, node)) for node in inner]) if inner else None
        known = None if ids is None else torch.tensor(ids)
        yield Draft("test", tree, tokens, probs, known, replaced), weight


def fixed_draft(tree: Tree, seed: int, vocab: int) -> Draft:
    """Deterministic guesses: distinct siblings, otherwise arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [0] * len(tree)
    for nodes in tree.children().values():
        for node, token in zip(nodes, torch.randperm(vocab, generator=generator).tolist(), strict=False):
            tokens[node] = token
    return Draft("test", tree, tuple(tokens))


def emitted_law(draft: Draft, target: Law, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """What the production acceptor emits for one tree of guesses, with probabilities."""
    tree, tokens = draft.tree, draft.tokens
    logits = torch.stack([target(path_to(tree, tokens, node)).log() for node in range(-1, len(tree))])
    request = Request("r", (0, 1), params)
    row = Row(0, request, 0, array("i", (0, 1)), 2, 1, 1, 0, tree.depth, [1])
    draws = ExhaustiveDraws()
    acceptor = Acceptor(draws, eos=())
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for outcome, weight in draws.runs(lambda: acceptor.accept([row], [draft], Scores(logits, (0,), ((),)))):
        (result,) = outcome  # type: ignore[misc]
        assert tuple(tokens[node] for node in result.accepted) == result.emitted[:-1]
        law[result.emitted] += weight
    return law


def largest_error(laws: Iterator[tuple[Draft, float]], target: Law, vocab: int, params: SamplingParams) -> float:
    """Largest difference between the law of continued emissions and the target's, over whole sequences."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    length = 1
    for draft, weight in laws:
        length = draft.tree.depth + 1
        for emitted, share in emitted_law(draft, target, params).items():
            for tail in itertools.product(range(vocab), repeat=length - len(emitted)):
                sequence = emitted + tail
                continued = 1.0
                for at in range(len(emitted), length):
                    continued *= float(target(sequence[:at])[sequence[at]])
                found[sequence] += weight * share * continued
    worst = 0.0
    for sequence in itertools.product(range(vocab), repeat=length):
        exact = 1.0
        for at in range(length):
            exact *= float(target(sequence[:at])[sequence[at]])
        worst = max(worst, abs(found[sequence] - exact))
    return worst


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("support", [None, 1, 2], ids=["full", "one", "two"])
def test_optimal_is_exact_for_sampled_children(name: str, support: int | None) -> None:
    """Chains and trees, also where the drafter's mass is used up before its children are."""
    vocab = 3
    target, proposal = random_law(1, vocab), random_law(2, vocab, support)
    error = largest_error(sampled_drafts(TREES[name], proposal), target, vocab, SamplingParams())
    assert error < 1e-12


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("support", [None, 1, 2], ids=["full", "one", "two"])
@pytest.mark.parametrize("replaced", [False, True], ids=["sequoia", "specinfer"])
def test_optimal_is_exact_for_drafters_that_know_some_tokens(name: str, support: int | None, replaced: bool) -> None:
    """A reduced vocabulary, also where the drafter's mass is used up before its children are."""
    target, proposal = random_law(1, 4), random_law(2, 3, support)
    drafts = sampled_drafts(TREES[name], proposal, replaced, ids=(0, 1, 3))
    assert largest_error(drafts, target, 4, SamplingParams()) < 1e-12


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("support", [None, 1, 2], ids=["full", "one", "two"])
def test_optimal_is_exact_for_independent_children(name: str, support: int | None) -> None:
    """SpecInfer's rule; equal siblings are possible."""
    vocab = 3
    target, proposal = random_law(1, vocab), random_law(2, vocab, support)
    error = largest_error(sampled_drafts(TREES[name], proposal, replaced=True), target, vocab, SamplingParams())
    assert error < 1e-12


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("support", [None, 1, 2], ids=["full", "one", "two"])
def test_optimal_is_exact_where_a_level_has_one_distribution(name: str, support: int | None) -> None:
    """As Medusa's heads have it: a node's children do not depend on the node."""
    target, level = random_law(1, 4), random_law(2, 3, support)
    drafts = sampled_drafts(TREES[name], lambda path: level((0,) * len(path)), ids=(0, 1, 3))
    assert largest_error(drafts, target, 4, SamplingParams()) < 1e-12


@pytest.mark.parametrize("vocab", [4, 5])
@pytest.mark.parametrize("children", [1, 2, 3])
def test_optimal_is_exact_on_larger_vocabularies(vocab: int, children: int) -> None:
    for seed in range(5):
        target = random_law(seed, vocab, support=None if seed % 2 else 3)
        proposal = random_law(seed + 100, vocab, support=None if seed % 3 else 2)
        tree = Tree((-1,) * children)
        assert largest_error(sampled_drafts(tree, proposal), target, vocab, SamplingParams()) < 1e-12


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("verification", ["optimal", "coupled"])
def test_deterministic_guesses_are_exact(name: str, verification: str) -> None:
    for seed in range(5):
        vocab = 3 + seed % 3
        draft = fixed_draft(TREES[name], seed, vocab)
        params = SamplingParams(verification=verification, seed=0)  # type: ignore[arg-type]
        assert largest_error(iter([(draft, 1.0)]), random_law(seed, vocab), vocab, params) < 1e-12


@pytest.mark.parametrize("name", TREES)
def test_coupled_is_exact_for_sampled_children(name: str) -> None:
    """However children are drawn, a token that only depends on the target's noise keeps the target's law."""
    target, proposal = random_law(5, 3), random_law(6, 3)
    params = SamplingParams(seed=0)
    assert largest_error(sampled_drafts(TREES[name], proposal), target, 3, params) < 1e-12


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("extra", [{}, {"min_tokens": 1}], ids=["raw argmax", "processed argmax"])
def test_greedy_emits_the_argmax_path(name: str, extra: dict[str, Any]) -> None:
    target, proposal = random_law(7, 4), random_law(8, 4)
    best: tuple[int, ...] = ()
    for _ in range(5):
        best = (*best, int(target(best).argmax()))
    for draft, _ in sampled_drafts(TREES[name], proposal):
        ((emitted, weight),) = emitted_law(draft, target, SamplingParams(temperature=0, **extra)).items()
        assert weight == 1
        assert emitted == best[: len(emitted)]
        longest = max(
            (
                len(path)
                for n in range(len(draft.tree))
                if (path := path_to(draft.tree, draft.tokens, n)) == best[: len(path)]
            ),
            default=0,
        )
        assert len(emitted) == longest + 1


def test_sequoia_accepts_more_than_one_by_one_rejection() -> None:
    """The cover property: P = [1, 0] and Q = [1/2, 1/2] with two children are always accepted (theorem 3.7)."""
    target = lambda path: torch.tensor([1.0, 0.0], dtype=torch.float64)  # noqa: E731
    proposal = lambda path: torch.tensor([0.5, 0.5], dtype=torch.float64)  # noqa: E731
    accepted = 0.0
    for draft, weight in sampled_drafts(TREES["pair"], proposal):
        law = emitted_law(draft, target, SamplingParams())
        accepted += weight * sum(share for emitted, share in law.items() if len(emitted) == 2)
    assert accepted == pytest.approx(1.0)


def test_sequoia_accepts_more_than_specinfer() -> None:
    """P = [1, 0] and Q = [1/2, 1/2]: two independent children accept in three of four cases (papers' example)."""
    target = lambda path: torch.tensor([1.0, 0.0], dtype=torch.float64)  # noqa: E731
    proposal = lambda path: torch.tensor([0.5, 0.5], dtype=torch.float64)  # noqa: E731
    accepted = 0.0
    for draft, weight in sampled_drafts(TREES["pair"], proposal, replaced=True):
        law = emitted_law(draft, target, SamplingParams())
        accepted += weight * sum(share for emitted, share in law.items() if len(emitted) == 2)
    assert accepted == pytest.approx(0.75)


def test_one_child_is_accepted_with_one_minus_total_variation() -> None:
    target, proposal = random_law(11, 5), random_law(12, 5)
    accepted = 0.0
    for draft, weight in sampled_drafts(Tree.chain(1), proposal):
        law = emitted_law(draft, target, SamplingParams())
        accepted += weight * sum(share for emitted, share in law.items() if len(emitted) == 2)
    distance = float((target(()) - proposal(())).abs().sum()) / 2
    assert accepted == pytest.approx(1 - distance, abs=1e-12)
