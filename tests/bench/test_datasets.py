"""Which prompts are drawn, and which are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from parlay.bench.datasets import Synthetic, draw, parse_dataset
from parlay.bench.workloads import load_prompts


def test_names() -> None:
    assert parse_dataset(None) is None
    assert parse_dataset("data/set.jsonl") == Path("data/set.jsonl")
    assert parse_dataset("synthetic.jsonl") == Path("synthetic.jsonl")
    assert parse_dataset("synthetic") == Synthetic(256, None)
    assert parse_dataset("synthetic:12") == Synthetic(12, None)
    assert parse_dataset("synthetic:12,34") == Synthetic(12, 34)


@pytest.mark.parametrize("text", ["synthetic:", "synthetic:0", "synthetic:3,", "synthetic:a,b", "synthetic:1,2,3"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write synthetic or synthetic:INPUT,OUTPUT"):
        parse_dataset(text)


def test_synthetic_prompts_have_the_length_and_differ_from_the_start() -> None:
    prompts = draw(Synthetic(20), 30, seed=1)
    assert {len(prompt.text.split()) for prompt in prompts} == {20}
    assert len({tuple(prompt.text.split()[:4]) for prompt in prompts}) == 30
    assert prompts == draw(Synthetic(20), 30, seed=1)
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in draw(Synthetic(20), 30, seed=2)}


def test_a_small_set_starts_over_in_the_order_of_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(10)))
    texts = [prompt.text for prompt in draw(file, 25, seed=3)]
    assert sorted(texts[:10]) == sorted(map(str, range(10)))
    assert texts[10:20] == texts[:10]
    assert texts[20:] == texts[:5]
    assert texts[:10] != list(map(str, range(10)))
    assert texts == [prompt.text for prompt in draw(file, 25, seed=3)]
    assert texts != [prompt.text for prompt in draw(file, 25, seed=4)]


def test_without_a_name_our_own_prompts_are_taken() -> None:
    assert set(draw(None, 1000, seed=0)) == set(load_prompts())
