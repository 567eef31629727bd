"""Logit processing against transformers' own warpers, and the random number generators against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parlay.engine.sampling import FreshDraws, Path, argmax, draw_without_replacement, gumbel_noise, philox, process
from parlay.types import SamplingParams
from tests.operators import needs_operators

VOCAB = 300


def logits_of(seed: int, lines: int = 1) -> torch.Tensor:
    return torch.randn(lines, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.5),
    repetition=st.floats(0.5, 2),
)
def test_processing_agrees_with_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float
) -> None:
    prompt, output = (1, 2, 3), (3, 4, 4)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition
    )
    found = process(logits_of(seed), [Path(params, prompt, output)]).softmax(-1)
    ids: Any = torch.tensor([prompt + output])
    logits: Any = logits_of(seed)
    expected: Any = RepetitionPenaltyLogitsProcessor(repetition)(ids, logits) / temperature
    if top_k > 0:
        expected = TopKLogitsWarper(min(top_k, VOCAB))(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    if min_p > 0:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lines_are_processed_by_their_own_parameters(dtype: torch.dtype) -> None:
    logits = logits_of(1, lines=5).to(dtype)
    paths = [
        Path(SamplingParams(top_k=2**70, temperature=0.5), (1,), ()),
        Path(SamplingParams(top_p=0.3), (1,), ()),
        Path(SamplingParams(temperature=0), (1,), ()),
        Path(SamplingParams(top_k=3, min_p=0.2), (1,), ()),
        Path(SamplingParams(frequency_penalty=1.0), (1,), (5, 5)),
    ]
    together = process(logits, paths)
    for line, path in enumerate(paths):
        assert together[line].equal(process(logits[line : line + 1], [path])[0])
    exact = process(logits.double(), paths)
    assert together.isfinite().equal(exact.isfinite())
    assert [int(count) for count in together.isfinite().sum(-1)][2:4] == [VOCAB, 3]


def test_penalties_bias_and_forbidden_tokens() -> None:
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0})
    found = process(logits, [Path(params, (7, 7), (5, 5, 6), forbidden=(8,))])[0]
    assert found[5].item() == -1.0  # once for being there, twice a quarter
    assert found[6].item() == -0.75
    assert found[7].item() == 0.0  # only in the prompt
    assert found[8].item() == float("-inf")
    assert found[9].item() == 2.0
    assert not logits.any(), "the model's logits were changed"


def test_top_p_widens_its_search_on_flat_distributions() -> None:
    logits = torch.linspace(0, 0.01, 5000, dtype=torch.float64)[None]
    kept = process(logits, [Path(SamplingParams(top_p=0.5), (), ())]).isfinite().sum()
    assert 2400 < kept < 2500


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """Known answers of Random123's distribution for philox4x32-10."""
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(w) for w in philox(tuple(torch.tensor([c]) for c in counter), (k0, k1))) == words


def test_gumbel_noise_depends_on_its_key_alone() -> None:
    device = torch.device("cpu")
    keys = [(1, 0, 0), (-1, 0, 0), (1, 1, 0), (1, 0, 1), (2**40 + 1, 0, 0)]
    together = gumbel_noise(keys, 101, device)
    for line, key in enumerate(keys):
        assert together[line].equal(gumbel_noise([key], 101, device)[0])
        assert together[line, :50].equal(gumbel_noise([key], 50, device)[0])
    assert len({tuple(row) for row in together.tolist()}) == len(keys)


def test_the_argmax_of_logits_and_noise_has_the_law_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 20000
    noise = gumbel_noise([(seed, 0, 3) for seed in range(count)], 5, logits.device)
    counts = (logits + noise).argmax(-1).bincount(minlength=5)
    assert noise.isfinite().all()
    assert chisquare(counts, logits.double().softmax(-1).numpy() * count).pvalue > 1e-4


def test_fresh_draws_have_their_laws() -> None:
    draws = FreshDraws(torch.Generator().manual_seed(0))
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    counts = draws.categorical(probs.expand(20000, 5)).bincount(minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4], probs[:4].double().numpy() / float(probs.double().sum()) * 20000).pvalue > 1e-4
    assert abs(draws.accept(torch.full((20000,), 0.3)).float().mean() - 0.3) < 0.02


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 1000])
def test_fresh_draws_never_take_what_has_no_probability(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.rand(400, vocab, generator=generator) * (torch.rand(400, vocab, generator=generator) < 0.02)
    probs[torch.arange(400), torch.randint(vocab, (400,), generator=generator)] += 1e-30
    chosen = FreshDraws(generator).categorical(probs / probs.sum(-1, keepdim=True))
    assert (probs.gather(1, chosen[:, None]) > 0).all()


@needs_operators
@pytest.mark.parametrize("vocab", [1, 7, 256, 1024, 1025, 49_152])
def test_the_operator_draws_what_pytorch_draws(vocab: int) -> None:
    """But for the share of draws that falls between two ways to round a sum."""
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.randn(2000 if vocab < 10_000 else 200, vocab, generator=generator).mul(3).softmax(-1)
    shares = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64)
    found = torch.ops.parlay.draw(probs, shares)
    heights = probs.double().cumsum(-1)
    wanted = torch.searchsorted(heights, shares * heights[:, -1:], right=True)[:, 0]
    assert (found != wanted).float().mean() < 0.02


@needs_operators
def test_the_operator_at_the_edges() -> None:
    lines = torch.zeros(5, 3000)
    lines[0, 7] = lines[1, 2999] = lines[2, 0] = 1e-38
    lines[3] = math.nan
    shares = torch.tensor([0.0, 1 - 2**-53, 0.5, 0.5, 0.5], dtype=torch.float64)
    assert torch.ops.parlay.draw(lines, shares).tolist() == [7, 2999, 0, 2999, 2999]


def test_fresh_draws_over_several_blocks_have_their_law() -> None:
    probs = torch.arange(1.0, 601).expand(60_000, -1) / 180_300
    chosen = FreshDraws(torch.Generator().manual_seed(1)).categorical(probs)
    assert chisquare(chosen.bincount(minlength=600).numpy(), 60_000 * probs[0].double().numpy()).pvalue > 1e-3


@needs_operators
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 7, 8, 300, 5003]),
    spread=st.sampled_from([0.0, 1e-3, 3.0, 50.0]),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.5),
)
def test_the_operator_keeps_what_pytorch_keeps(
    seed: int, vocab: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Ties aside, and masses so close to the limit that the order of a sum decides."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    logits[1, : vocab // 2] = -math.inf
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    found = process(logits, [Path(params, (), ())] * 3)
    exact = process(logits.double(), [Path(params, (), ())] * 3)
    differs = found.isfinite() != exact.isfinite()
    assert (exact.softmax(-1) * differs).sum() + (found.double().softmax(-1) * differs).sum() < 1e-5 + spread * 1e-5
    both = found.isfinite() & exact.isfinite()
    assert both.any(-1).all()
    assert torch.allclose(found[both].double(), exact[both])
    assert torch.equal(process(logits[2:], [Path(params, (), ())]), found[2:]), "a line depends on those beside it"


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 8, 300, 4099])
def test_the_operators_argmax(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] = 3
    logits[2] = -math.inf
    logits[3, vocab // 2] = math.inf
    logits[4, vocab - 1] = math.nan
    logits[5, [vocab // 3, vocab - 1]] = 99
    assert argmax(logits).tolist() == [int(line.argmax()) for line in logits.double().numpy()]


def test_undefined_probabilities_still_give_a_token() -> None:
    draws = FreshDraws(torch.Generator().manual_seed(0))
    assert 0 <= draws.categorical(torch.full((1, 5), math.nan)).item() < 5


def test_children_are_drawn_without_replacement_in_order() -> None:
    """Pairs occur as often as drawing, removing and renormalising says; leftovers are uniform."""
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=torch.float64)
    count = 20000
    drawn = draw_without_replacement(probs.expand(count, 5), 4, torch.Generator().manual_seed(1))
    pairs = (drawn[:, 0] * 5 + drawn[:, 1]).bincount(minlength=25).tolist()
    expected = [
        float(probs[i] * probs[j] / (1 - probs[i])) * count if i != j else 0.0 for i in range(5) for j in range(5)
    ]
    positive = [i for i, e in enumerate(expected) if e > 0]
    assert sum(pairs[i] for i in positive) == count
    assert chisquare([pairs[i] for i in positive], [expected[i] for i in positive]).pvalue > 1e-4
    last = drawn[:, 3].bincount(minlength=5)
    assert last[:3].sum() == 0
    assert abs(int(last[3]) - count / 2) < 4 * (count / 4) ** 0.5
