"""Divergences and their gradients are those of autograd over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from parlay.train import losses
from parlay.train.losses import DIVERGENCES, Divergence, Targets, head_loss, logits_loss

VOCAB, WIDTH, PLACES = 11, 7, 9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4)


def reference(divergence: Divergence, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    log_q = logits.log_softmax(-1)
    return {
        "forward_kl": (target * (target.log() - log_q)).sum(-1),
        "reverse_kl": (log_q.exp() * (log_q - target.log())).sum(-1),
        "tvd": 0.5 * (log_q.exp() - target).abs().sum(-1),
    }[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients(divergence: Divergence) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(PLACES, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    target = torch.randn(PLACES, VOCAB, dtype=torch.float64).softmax(-1)
    weights = torch.rand(PLACES, dtype=torch.float64)
    probs, ids = target.topk(VOCAB)
    # Tokens outside of the vocabulary are written as token 0 without probability.
    padded = torch.cat([ids, ids[:, :2] * 0], 1), torch.cat([probs, probs[:, :2] * 0], 1)
    total, agreement = head_loss(hidden, weight, Targets(*padded, weights), divergence)
    found = torch.autograd.grad(total, (hidden, weight))
    logits = hidden @ weight.T
    expected = (reference(divergence, logits, target) * weights).sum()
    torch.testing.assert_close(total, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(agreement, torch.minimum(logits.softmax(-1), target).sum(-1).detach())
    # Of logits that are there it is the same.
    again, agreement_again = logits_loss(hidden @ weight.T, Targets(*padded, weights), divergence)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(agreement_again, agreement)
    torch.testing.assert_close(torch.autograd.grad(3 * again, hidden)[0], 3 * found[0])


def test_forward_kl_leaves_out_what_the_drafter_cannot_say() -> None:
    """The target is normalised over the tokens that are there."""
    hidden, weight = torch.zeros(1, 2), torch.zeros(2, 2)
    targets = Targets(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.3]]), torch.ones(1))
    total, agreement = head_loss(hidden, weight, targets, "forward_kl")
    assert float(total) == pytest.approx(0, abs=1e-6)
    assert float(agreement) == pytest.approx(0.6)
