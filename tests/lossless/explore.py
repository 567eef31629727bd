"""Runs the production acceptor down every branch of its chance, with exact probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch


class ExhaustiveDraws:
    """Draws that follow a script of branches, note where else they could have gone, and weigh the branch taken."""

    def __init__(self) -> None:
        self._pending: list[list[int]] = []
        self._script: list[int] = []
        self._used = 0
        self.weight = 1.0

    def runs(self, run: Callable[[], object]) -> Iterator[tuple[object, float]]:
        """Every outcome of `run` with its probability."""
        self._pending = [[]]
        while self._pending:
            self._script, self._used, self.weight = self._pending.pop(), 0, 1.0
            outcome = run()
            yield outcome, self.weight

    def _branch(self, probabilities: Sequence[float]) -> int:
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        if self._used == len(self._script):
            self._pending += [[*self._script, other] for other in possible[1:]]
            self._script.append(possible[0])
        chosen = self._script[self._used]
        self._used += 1
        self.weight *= probabilities[chosen]
        return chosen

    def accept(self, probability: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._branch([p, 1 - p]) == 0 for p in probability.tolist()], dtype=torch.bool)

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._branch(row) for row in probs.tolist()])

    def gumbel(self, keys: Sequence[tuple[int, int, int]], logits: torch.Tensor) -> torch.Tensor:
        """Noise that lets token x win, once for each x, with the probability that Gumbel noise would: softmax(x)."""
        noise = torch.zeros_like(logits)
        for line, row in enumerate(logits.softmax(-1).tolist()):
            noise[line, self._branch(row)] = 1e9
        return noise
