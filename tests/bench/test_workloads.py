"""Prompts in both forms, and ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from parlay.bench.workloads import Prompt, by_category, load_prompts


def test_own_prompts_are_a_mix() -> None:
    prompts = load_prompts()
    groups = by_category(prompts)
    assert set(groups) == {"summarise", "code", "chat"}
    assert all(len(group) >= 5 for group in groups.values())
    assert {prompt.category for prompt in prompts[:3]} == set(groups)
    assert len(set(prompts)) == len(prompts) >= 16


def test_both_forms_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"category": "a", "prompt": "one"}\n'
        '{"id": 7, "category": "a", "turns": ["two", "and then?"]}\n'
        "\n"
        '{"category": "b", "turns": ["three"]}\n'
        '{"prompt": "four"}\n'
    )
    assert load_prompts(file) == [Prompt("a", "one"), Prompt("b", "three"), Prompt("all", "four"), Prompt("a", "two")]
    assert load_prompts(file, limit=2) == [Prompt("a", "one"), Prompt("b", "three")]


@pytest.mark.parametrize("line", ["not JSON", "[]", "{}", '{"turns": []}', '{"prompt": 3}', '"text"'])
def test_another_form_is_refused_by_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: write"):
        load_prompts(file)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(file)
