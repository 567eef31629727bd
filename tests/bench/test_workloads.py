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


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        "{}",
        '{"turns": []}',
        '{"prompt": 3}',
        '"text"',
        '{"messages": []}',
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        '{"conversations": [{"from": "human"}]}',
    ],
)
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


def test_messages_end_with_the_users_last(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},'
        ' {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},'
        ' {"role": "assistant", "content": "d"}]}\n'
    )
    [prompt] = load_prompts(file)
    assert prompt.text == "c"
    assert [message["content"] for message in prompt.messages] == ["s", "a", "b", "c"]
    assert prompt.messages[-1] == {"role": "user", "content": "c"}


def test_sharegpt_takes_the_first_human_turn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sharegpt.json"
    file.write_text(
        '[{"id": "x", "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}]},\n'
        '{"conversations": [{"from": "gpt", "value": "0"}, {"from": "human", "value": "two"}]},\n'
        '{"conversations": []}]'
    )
    assert load_prompts(file) == [Prompt("all", "one"), Prompt("all", "two")]
    assert "left out 1 conversations" in caplog.text


def test_a_bad_list_says_where(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text('[{"prompt": "fine"}, {"conversations": 3}]')
    with pytest.raises(ValueError, match=r"list\.json: entry 2: write"):
        load_prompts(file)
    file.write_text('[{"prompt": "fine"},\n {"prompt": ]')
    with pytest.raises(ValueError, match=r"list\.json:2: the list is no JSON"):
        load_prompts(file)


def test_odd_line_ends_inside_a_prompt_are_its_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\n', encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(file)] == ["a\u2028b", "c\x85d"]
