"""Verification of sampled siblings: Sequoia's sampling without replacement, SpecInfer's with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parlay.engine.sampling import Draws


def choose(
    target: torch.Tensor,
    draft: torch.Tensor,
    ids: torch.Tensor | None,
    options: Sequence[Sequence[int]],
    replaced: Sequence[bool],
    draws: Draws,
) -> torch.Tensor:
    """The next token of nodes whose children were sampled, child by child, for all nodes at once.

    R starts as the target's distribution and D as the drafter's. Child s is accepted with probability
    min(1, R[s] / D[s]); otherwise R becomes the normalised max(R - D, 0) and s leaves D. When D is used up it becomes
    uniform over what the drafter can say and has not been rejected. After the last child the token is a sample from R.
    Where children were drawn with replacement, D stays as it is. (Sequoia, Chen et al. 2024, algorithm 2; SpecInfer,
    Miao et al. 2024.)

    Args:
        target: [A, V] probabilities.
        draft: [A, W] what each node's children were drawn from.
        ids: [W] the tokens that these are of; None where they are all of them.
        options: Each node's children in draw order.
        replaced: Whether they were drawn with replacement.
        draws: The source of chance.

    Returns:
        [A] tokens.
    """
    both, chosen = _Both(target, draft, ids), [-1] * len(options)
    for turn in range(max(map(len, options))):
        lines = [i for i, some in enumerate(options) if turn < len(some) and chosen[i] < 0]
        if not lines:
            break
        accepted = draws.accept(both.ratio(lines, [options[i][turn] for i in lines])).tolist()
        for i, kept in zip(lines, accepted, strict=True):
            if kept:
                chosen[i] = options[i][turn]
        lost = [i for i in lines if chosen[i] < 0]
        if lost:
            both.subtract(lost)
            alone = [i for i in lost if not replaced[i]]
            both.remove(alone, [options[i][: turn + 1] for i in alone])
    result = torch.tensor(chosen, device=target.device)
    if undecided := [i for i, token in enumerate(chosen) if token < 0]:
        result[result < 0] = draws.categorical(both.rest(undecided))
    return result


class _Both:
    """R and D as masses that are never normalised, so that of R only what the drafter can say has to be touched."""

    def __init__(self, target: torch.Tensor, draft: torch.Tensor, ids: torch.Tensor | None) -> None:
        self._target, self._ids = target, ids
        self._left = target.clone() if ids is None else target.index_select(1, ids)  # [A, W] of R
        self._draft = draft.to(target, copy=True)  # [A, W]
        self._mass, self._weight = target.new_ones(len(target)), self._draft.sum(-1)  # [A] of all of R, of D
        self._elsewhere: torch.Tensor | None = None  # [A] of R, what the drafter cannot say

    def ratio(self, lines: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """[N] min(1, R / D) of one token in each of these lines."""
        line, place = self._tensor(lines), self._places(tokens)
        wanted = self._left[line, place] / self._mass[line]
        offered = self._draft[line, place] / self._weight[line]
        return torch.where(offered > 0, wanted / offered, torch.zeros_like(wanted)).clamp(max=1)

    def subtract(self, lines: Sequence[int]) -> None:
        """R becomes max(R - D, 0); it stays where nothing would be left."""
        if self._elsewhere is None:
            inside = self._target[:, :0] if self._ids is None else self._target.index_fill(1, self._ids, 0)
            self._elsewhere = inside.sum(-1)
        line = self._tensor(lines)
        mass, weight, left = self._mass[line], self._weight[line][:, None], self._left[line]
        share = torch.where(weight > 0, self._draft[line] / weight, torch.zeros_like(left))
        rest = torch.addcmul(left, share, mass[:, None], value=-1).clamp_(min=0)
        total = rest.sum(-1) + self._elsewhere[line]
        some = total > 0
        self._left[line] = torch.where(some[:, None], rest, left)
        self._mass[line] = torch.where(some, total, mass)

    def remove(self, lines: Sequence[int], tried: Sequence[Sequence[int]]) -> None:
        """The last of the tokens that were tried leaves D; where that was all, D is uniform over what was not tried."""
        if not lines:
            return
        line, place = self._tensor(lines), self._places([some[-1] for some in tried])
        self._draft[line, place] = 0
        self._weight[line] = weight = self._draft[line].sum(-1)
        for at, left, some in zip(lines, weight.tolist(), tried, strict=True):
            if left <= 0:
                self._draft[at] = 1
                self._draft[at, self._places(some)] = 0
                self._weight[at] = self._draft[at].sum()

    def rest(self, lines: Sequence[int]) -> torch.Tensor:
        """[N, V] R in these lines, normalised."""
        line = self._tensor(lines)
        found = self._left[line]
        if self._ids is not None:
            found = self._target[line].index_copy_(1, self._ids, found)
        return found / self._mass[line][:, None]

    def _places(self, tokens: Sequence[int]) -> torch.Tensor:
        """[N] where tokens are among what the drafter can say."""
        found = self._tensor(tokens)
        return found if self._ids is None else (self._ids == found[:, None]).to(torch.uint8).argmax(-1)

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self._target.device)
