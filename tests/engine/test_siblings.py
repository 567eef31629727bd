"""Sampled siblings are verified as the papers' pseudocode does it, whatever share of the tokens the drafter can say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parlay.engine.siblings import choose


class Scripted:
    """Chance from a list; what is asked of it is kept."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers, self.ratios, self.rests = [*numbers], list[float](), list[torch.Tensor]()

    def accept(self, probability: torch.Tensor) -> torch.Tensor:
        self.ratios += probability.tolist()
        return torch.tensor([self.numbers.pop(0) < one for one in probability.tolist()])

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        self.rests += [*probs]
        return probs.argmax(-1)

    def gumbel(self, keys: Sequence[tuple[int, int, int]], logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody asks for noise")


def by_the_book(
    target: torch.Tensor, draft: torch.Tensor, options: Sequence[int], replaced: bool, numbers: Sequence[float]
) -> tuple[list[float], int | None, torch.Tensor]:
    """Normalised in every step, over all tokens; draft: [V], below zero where the drafter cannot go."""
    can = draft >= 0
    r, d = target.clone(), draft.clamp(min=0)
    tried = torch.zeros_like(can)
    ratios = []
    for token, number in zip(options, numbers, strict=False):
        ratios.append(min(1.0, float(r[token] / d[token])) if d[token] > 0 else 0.0)
        if number < ratios[-1]:
            return ratios, token, r
        rest = (r - d).clamp(min=0)
        r = rest / rest.sum() if rest.sum() > 0 else r
        if not replaced:
            tried[token] = True
            d = torch.where(tried, torch.zeros_like(d), d)
            free = (can & ~tried).to(d)
            d = d / d.sum() if d.sum() > 0 else free / free.sum().clamp(min=1)
    return ratios, None, r


@given(st.data())
def test_ratios_and_what_is_left_are_those_of_the_book(data: st.DataObject) -> None:
    vocab, said = 6, data.draw(st.integers(2, 6))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=vocab, max_size=vocab).filter(any)
    ids = data.draw(st.permutations(range(vocab)))[:said]
    reduced = said < vocab or data.draw(st.booleans())
    ids = ids if reduced else [*range(vocab)]
    targets, drafts, options, replaced = [], [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        target = torch.tensor(data.draw(weights), dtype=torch.float64)
        inside = [data.draw(st.sampled_from([0.0, 1.0, 2.0])) for _ in ids]
        inside = inside if any(inside) else [1.0] * said
        targets.append(target / target.sum())
        drafts.append(torch.tensor(inside, dtype=torch.float64) / sum(inside))
        replaced.append(data.draw(st.booleans()))
        options.append(data.draw(st.permutations(ids))[: data.draw(st.integers(1, said))])
    numbers = [[data.draw(st.floats(0, 0.999)) for _ in some] for some in options]
    expected = []
    for target, draft, some, again, chance in zip(targets, drafts, options, replaced, numbers, strict=True):
        whole = torch.full((vocab,), -1.0, dtype=torch.float64).index_copy(0, torch.tensor(ids), draft)
        expected.append(by_the_book(target, whole, some, again, chance))
    asked = [  # turn by turn, of the nodes that have not found a token yet
        chance[turn]
        for turn in range(said)
        for chance, (ratios, _, _) in zip(numbers, expected, strict=True)
        if turn < len(ratios)
    ]
    draws = Scripted(asked)
    which = torch.tensor(ids) if reduced else None
    found = choose(torch.stack(targets), torch.stack(drafts), which, options, replaced, draws).tolist()
    ratios = [ratios[turn] for turn in range(said) for ratios, _, _ in expected if turn < len(ratios)]
    assert draws.ratios == pytest.approx(ratios, abs=1e-9)
    lost = [rest for _, token, rest in expected if token is None]
    assert all(torch.allclose(one, rest, atol=1e-9) for one, rest in zip(draws.rests, lost, strict=True))
    rests = iter(draws.rests)
    wanted = [token if token is not None else int(next(rests).argmax()) for _, token, _ in expected]
    assert found == wanted


def test_what_is_hardly_likely_is_subtracted_too() -> None:
    """In float32, what is left of D may be too small to be divided by."""
    draft, target = torch.tensor([[0.0, -90.0, -200.0, -200.0]]).softmax(-1), torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    assert 0 < draft[0, 1] < 1e-38
    draws = Scripted([0.9, 0.9])
    choose(target, draft, None, [[0, 1]], [False], draws)
    assert draws.ratios == pytest.approx([0.2, 0.375])
    assert draws.rests[0].tolist() == pytest.approx([0, 0, 0.6, 0.4])


@pytest.mark.parametrize("reduced", [False, True])
def test_nothing_that_was_given_is_changed(reduced: bool) -> None:
    target, draft = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.5, 0.5]])
    kept = target.clone(), draft.clone()
    choose(target, draft, torch.arange(3) if reduced else None, [[1, 2]], [False], Scripted([0.9, 0.9]))
    assert torch.equal(target, kept[0])
    assert torch.equal(draft, kept[1])
