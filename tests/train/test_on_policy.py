"""Texts of a draft model's own: who writes them, and whose distributions are learned behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from parlay.config import EngineConfig
from parlay.engine.checkpoint import resolve
from parlay.engine.model import LoadedModel, load_model
from parlay.train.dataset import Batch, batches
from parlay.train.draft_model import new_student
from parlay.train.on_policy import OnPolicy, prompt_lengths, written
from parlay.train.recording import Recorded
from tests.architectures import make_model, plain_model
from tests.tiny import VOCAB_SIZE

TOP = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def target(folder: Path) -> LoadedModel:
    return load_model(resolve(str(folder)), EngineConfig(str(folder), dtype="float32", self_check=False))


@pytest.fixture(scope="module")
def student(target: LoadedModel) -> Any:
    return new_student(target, (0,))


def batch(*texts: tuple[int, int]) -> Batch:
    """One of texts of random tokens with the given lengths and beginnings of answers."""
    generator = torch.Generator().manual_seed(0)
    found = [
        Recorded(
            torch.randint(1, VOCAB_SIZE, (length,), generator=generator),
            start,
            torch.zeros(length, 0, 32),
            torch.zeros(length, TOP, dtype=torch.int32),
            torch.full((length, TOP), -2.0),
        )
        for length, start in texts
    ]
    (one,) = batches(found, 10_000, None)
    return one


@torch.inference_mode()
def greedy_tail(model: Any, text: torch.Tensor, start: int) -> torch.Tensor:
    """What a model's most likely token is, in place of each token behind the prompt."""
    return model(text[None]).logits[0, start - 1 : -1].argmax(-1)


def test_the_student_writes_and_the_target_judges(folder: Path, target: LoadedModel, student: Any) -> None:
    """Behind each prompt stand the student's tokens; every place's distribution is the target's, computed alone."""
    before = batch((12, 4), (20, 7), (31, 9))
    found = OnPolicy(student, target, 1.0, seed=0)(before, 3)
    starts = prompt_lengths(before)
    assert starts == [4, 7, 9]
    plain = plain_model(folder, torch.float32)
    for line, (start, limit) in enumerate(zip(starts, (12, 20, 31), strict=True)):
        length = int((found.probs[line, :, 0] > 0).sum())
        text = found.tokens[line, :length]
        assert start <= length <= limit
        assert text[:start].equal(before.tokens[line, :start])
        with torch.inference_mode():
            best = plain(text[None]).logits[0].softmax(-1).topk(64)
        torch.testing.assert_close(found.probs[line, :length], best.values, rtol=1e-4, atol=1e-6)
        assert (found.ids[line, :length] == best.indices).float().mean() > 0.99
        assert found.answer[line].nonzero().flatten().tolist() == list(range(start - 1, length))
        assert not found.probs[line, length:].any()
    assert found.count == sum(int(line.any()) for text in found.probs for line in text)


def test_texts_are_the_students(student: Any, target: LoadedModel) -> None:
    """The first token behind one prompt occurs as often as the student says, and not as often as the target does."""
    one = batch((7, 6))
    many = Batch(*(getattr(one, name).expand(2000, *[-1] * (getattr(one, name).ndim - 1)) for name in Batch.__slots__))
    texts = written(student, many, [6] * 2000, (), seed=5)
    counts = torch.bincount(torch.stack(texts)[:, 6], minlength=VOCAB_SIZE).double()
    for model, fits in ((student, True), (target.model, False)):
        with torch.inference_mode():
            law = model(one.tokens[:, :6]).logits[0, -1].double().softmax(-1)
        common = law.topk(20).indices
        observed = torch.cat([counts[common], (counts.sum() - counts[common].sum())[None]])
        expected = torch.cat([law[common], (1 - law[common].sum())[None]]) * counts.sum()
        assert (chisquare(observed, expected).pvalue > 1e-3) == fits


def test_padding_and_ends(student: Any) -> None:
    """A line's text does not depend on the others' prompts, and stops in front of an end."""
    some = batch((14, 3), (14, 8))
    sharp = _Sharp(student)
    texts = written(sharp, some, [3, 8], (), seed=0)
    for text, start in zip(texts, (3, 8), strict=True):
        assert text[start:].equal(greedy_tail(student, text, start))
    end = int(texts[1][10])
    first = texts[1][8:].tolist().index(end) + 8
    assert written(sharp, some, [3, 8], (end,), seed=0)[1].equal(texts[1][:first])


class _Sharp:
    """A student that is so sure of everything that sampling is greedy."""

    def __init__(self, student: Any) -> None:
        self._student = student

    def generate(self, prompts: torch.Tensor, **options: Any) -> torch.Tensor:
        options["generation_config"].temperature = 1e-4
        return self._student.generate(prompts, **options)


def test_prompts_of_texts_that_were_cut() -> None:
    """A part in the midst of an answer is gone on with from its middle; a part without an answer is left as it is."""
    assert prompt_lengths(batch((20, 0), (20, 30), (20, 19))) == [10, 20, 19]


def test_share_and_seed(target: LoadedModel, student: Any) -> None:
    one = batch((16, 5), (16, 6))
    own = OnPolicy(student, target, 0.3, seed=0)
    found = [own(one, step) for step in range(60)]
    assert 8 < sum(some is not one for some in found) < 30
    for step in (3, 40, 59):  # in any order, whatever was drawn before
        torch.rand(step)
        assert own(one, step).tokens.equal(found[step].tokens)
    changed = [some.tokens.tolist() for some in found if some is not one]
    assert len({str(tokens) for tokens in changed}) == len(changed)
    state = torch.get_rng_state()
    OnPolicy(student, target, 1.0, seed=0)(one, 1)
    assert torch.get_rng_state().equal(state)
    assert OnPolicy(student, target, 0.0, seed=0)(one, 1) is one
