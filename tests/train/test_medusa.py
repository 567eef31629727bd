"""What Medusa heads learn is what they are asked when they guess, and what is counted is what would be accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.medusa import Medusa
from parlay.drafters.medusa_heads import MedusaHeads
from parlay.engine.checkpoint import resolve
from parlay.engine.engine import Engine
from parlay.engine.model import load_model
from parlay.train.dataset import Batch
from parlay.train.medusa import DECAY, MedusaObjective, new_heads
from parlay.train.recording import Recorded
from parlay.types import Request, SamplingParams, StepPlan
from tests.architectures import make_model, plain_model
from tests.drafting import HIDDEN, tiny_medusa
from tests.tiny import VOCAB_SIZE

HEADS, TOP, NOISE = 3, 5, 0.02


def random_batch(lengths: tuple[int, ...] = (9, 6)) -> Batch:
    """Texts with padding; every token counts as an answer's from the third on."""
    generator = torch.Generator().manual_seed(0)
    texts, longest = len(lengths), max(lengths)
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    probs = torch.rand(texts, longest, TOP, generator=generator).sort(-1, descending=True).values
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:TOP] for _ in range(texts * longest)])
    return Batch(
        tokens=torch.randint(0, VOCAB_SIZE, (texts, longest), generator=generator) * real,
        hidden=torch.randn(texts, longest, 1, HIDDEN, generator=generator) * real[..., None, None],
        ids=ids.view(texts, longest, TOP) * real[..., None],
        probs=probs / probs.sum(-1, keepdim=True) * real[..., None],
        answer=real & (torch.arange(longest)[None] >= 2),
    )


def test_head_k_learns_what_was_said_k_tokens_later() -> None:
    """The loss, summed place by place with autograd over whole distributions."""
    batch, heads = random_batch(), tiny_medusa(heads=HEADS)
    objective = MedusaObjective(heads, VOCAB_SIZE, 2, "forward_kl", "")
    found, first = objective.loss(batch, 0.0)
    place = {token: number for number, token in enumerate(heads.ids.tolist())}
    expected, agreed = torch.zeros(()), []
    for text, count in enumerate((batch.probs[..., 0] > 0).sum(1).tolist()):
        for at in range(count):
            logits = heads(batch.hidden[text, at, 0], HEADS).log_softmax(-1)
            for head in range(HEADS):
                if at + head + 1 >= count:
                    continue
                ids, probs = batch.ids[text, at + head + 1].tolist(), batch.probs[text, at + head + 1]
                can = [number for number, token in enumerate(ids) if token in place]
                if float(probs[can].sum()) <= 0.05:
                    continue
                guessed = logits[head][[place[ids[number]] for number in can]]
                p = probs[can] / probs[can].sum()
                expected = expected + DECAY**head * (p * (p.log() - guessed)).sum() / batch.count
                if head == 0:
                    agreed.append(float(torch.minimum(probs[can], guessed.detach().exp()).sum()))
    torch.testing.assert_close(found, expected)
    assert first == pytest.approx(sum(agreed) / len(agreed))
    ours, theirs = (torch.autograd.grad(some, list(heads.parameters())) for some in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_heads_begin_with_the_next_token() -> None:
    """Nothing in the residual blocks, and the target's own matrix for its most frequent tokens."""
    output = torch.randn(20, HIDDEN)
    ids = torch.tensor([3, 3, 3, 7, 7, 11])[:, None].repeat(1, TOP).int()
    text = Recorded(torch.tensor([3, 3, 7, 7, 11, 12]).int(), 2, torch.zeros(6, 1, HIDDEN), ids, torch.zeros(6, TOP))
    heads = new_heads(output, [text], HEADS, 3)
    assert heads.ids.tolist() == [3, 7, 11]
    hidden = torch.randn(4, HIDDEN)
    for logits in heads(hidden, HEADS):
        torch.testing.assert_close(logits, (hidden @ output.T)[:, [3, 7, 11]])


class _Always:
    """Bets where it can."""

    def plan(self, rows: Any, offers: Any, budget: int) -> StepPlan:
        return StepPlan(tuple(Bet("medusa", Tree.chain(HEADS)) if some else None for some in offers))

    def observe(self, rows: Any, result: Any) -> None:
        pass


@torch.inference_mode()
def test_what_is_counted_is_what_the_engine_accepts(tmp_path: Path) -> None:
    """Chains of guesses behind one another over a greedy answer, against those that the drafter makes there."""
    folder = make_model(tmp_path, "llama")
    config = EngineConfig(str(folder), dtype="float64", speculation=None, self_check=False, prefix_caching=False)
    engine = Engine(config)
    prompt, length = (5, 6, 7, 8), 60
    engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)))
    answer = [token for _ in range(length) for delta in engine.step() for token in delta.tokens]
    tokens = torch.tensor([[*prompt, *answer]])
    plain = plain_model(folder)
    hidden = plain.model(input_ids=tokens).last_hidden_state
    probs, ids = plain(input_ids=tokens).logits.softmax(-1).topk(TOP)
    heads = _sometimes_right(hidden[0], tokens[0])
    batch = Batch(tokens, hidden[:, :, None], ids, probs, torch.arange(tokens.shape[1])[None] >= len(prompt))
    accepted, steps = MedusaObjective(heads, VOCAB_SIZE, 2, "forward_kl", "").accepted(batch, HEADS + 1)
    assert steps > accepted[0] >= accepted[1] >= accepted[2] > accepted[3] == 0
    drafter = Medusa(heads, Tree.chain(HEADS), load_model(resolve(str(folder)), config))
    engine.drafters = Drafters([drafter])
    drafter.attach(engine.model)
    engine.policy = _Always()
    expected = torch.zeros(HEADS + 1)
    place, counted = len(prompt), 0
    while place < tokens.shape[1] - 1 - (HEADS + 1):
        # What is bet in the second step is behind the token at this place, which the first step emits.
        params = SamplingParams(temperature=0, max_tokens=HEADS + 2, ignore_eos=True)
        engine.add(Request("r", tuple(tokens[0, :place].tolist()), params))
        engine.step()
        (delta,) = engine.step()
        assert delta.stats.drafted == HEADS
        expected[: delta.stats.accepted] += 1
        engine.abort("r")
        place, counted = place + delta.stats.accepted + 1, counted + 1
    assert steps == counted
    assert accepted.tolist() == expected.tolist()


def _sometimes_right(hidden: torch.Tensor, tokens: torch.Tensor) -> MedusaHeads:
    """Heads whose matrices were fitted to a text, but not well. hidden: [T, hidden]; tokens: [T]."""
    torch.manual_seed(0)
    heads = tiny_medusa(heads=HEADS, vocab=VOCAB_SIZE, shared=False).double()
    every = torch.nn.functional.one_hot(tokens, VOCAB_SIZE).double()
    for head in range(HEADS):
        states = heads.state(head, hidden)[: -2 - head]
        found = torch.linalg.lstsq(states, every[2 + head :]).solution.T
        heads.product(head).weight.copy_(found + NOISE * torch.randn_like(found))
    return heads
