"""Drafters and policies that only a test would bet on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from parlay.bets import Bet, Tree
from parlay.drafters.base import Drafter
from parlay.engine.batch import Draft
from parlay.engine.sampling import draw_without_replacement
from parlay.policy.base import PolicyRow
from parlay.types import Offer, Row, StepPlan, StepResult


def random_tree(rng: random.Random, size: int) -> Tree:
    return Tree(tuple(rng.randint(max(-1, node - 3), node - 1) for node in range(size)))


class RandomPolicy:
    """A different method and tree for every row and step, or nothing."""

    def __init__(self, seed: int, methods: Sequence[str], largest: int = 7) -> None:
        self._rng = random.Random(seed)
        self._methods = methods
        self._largest = largest

    def plan(self, rows: Sequence[PolicyRow], offers: Sequence[Sequence[Offer]], budget: int) -> StepPlan:
        bets: list[Bet | None] = []
        for row in rows:
            tree = random_tree(self._rng, self._rng.randint(0, self._largest)).trim(budget, row.max_depth)
            budget -= len(tree)
            bet = Bet(self._rng.choice(self._methods), tree, free=self._rng.random() < 0.5)
            bets.append(bet if tree else None)
        return StepPlan(tuple(bets))

    def observe(self, rows: Sequence[PolicyRow], result: StepResult) -> None:
        pass


class _Drafter(Drafter):
    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        return [None] * len(rows)


class NoisyOracle(_Drafter):
    """Knows each prompt's output, and puts the right token at a random child of most nodes."""

    name = "noisy_oracle"

    def __init__(self, outputs: Mapping[tuple[int, ...], Sequence[int]], vocab: int, seed: int = 0) -> None:
        self._outputs, self._vocab, self._rng = outputs, vocab, random.Random(seed)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        return [self._draft(row, bet.tree) for row, bet in zip(rows, bets, strict=True)]

    def _draft(self, row: Row, tree: Tree) -> Draft:
        future = list(self._outputs[row.request.prompt])[len(row.tokens) - len(row.request.prompt) :]
        tokens = [0] * len(tree)
        right = {-1}  # nodes on the path that will be taken
        for parent, nodes in tree.children().items():
            values = self._rng.sample(range(self._vocab), len(nodes))
            depth = tree.depths[nodes[0]] - 1
            if parent in right and depth < len(future) and self._rng.random() < 0.8:
                lucky = self._rng.randrange(len(nodes))
                values = [v if v != future[depth] else (v + 1) % self._vocab for v in values]
                values[lucky] = future[depth]
                right.add(nodes[lucky])
            for node, value in zip(nodes, values, strict=True):
                tokens[node] = value
        return Draft(self.name, tree, tuple(tokens))


class RandomSampler(_Drafter):
    """Samples children without replacement from random distributions: hostile, and exact by its probabilities."""

    name = "random_sampler"

    def __init__(self, vocab: int, seed: int = 0) -> None:
        self._vocab = vocab
        self._generator = torch.Generator().manual_seed(seed)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        return [self._draft(bet.tree) for bet in bets]

    def _draft(self, tree: Tree) -> Draft:
        children = tree.children()
        inner = sorted(children)
        probs = (3 * torch.randn(len(inner), self._vocab, generator=self._generator, dtype=torch.float64)).softmax(-1)
        tokens = [0] * len(tree)
        for line, node in enumerate(inner):
            drawn = draw_without_replacement(probs[line][None], len(children[node]), self._generator)[0]
            for child, token in zip(children[node], drawn.tolist(), strict=True):
                tokens[child] = token
        return Draft(self.name, tree, tuple(tokens), probs)
