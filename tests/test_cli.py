"""The command line: what it passes on, what it refuses and how it says so."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import parlay
from parlay.bets import Bet, Tree, parse_bet
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.options import parse_bytes
from parlay.types import CompletionOutput, RequestOutput, SamplingParams, SpeculationStats


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


class FakeLLM:
    """Answers every prompt with `fine`, four tokens in two steps, and remembers what it was asked."""

    def __init__(self, config: EngineConfig) -> None:
        FakeLLM.config = config
        FakeLLM.calls = []

    config: EngineConfig
    calls: list[tuple[str, Any, SamplingParams]]

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
        return self._answer("generate", prompts, params)

    def chat(self, conversations: list[Any], params: SamplingParams) -> list[RequestOutput]:
        return self._answer("chat", conversations, params)

    def _answer(self, verb: str, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
        FakeLLM.calls.append((verb, prompts, params))
        stats = SpeculationStats(steps=2, drafted=4, accepted=2)
        choice = CompletionOutput(0, "fine", (1, 2, 3, 4), "stop", None, (), stats, {"suffix": stats})
        return [RequestOutput(str(number), None, (9,), (choice,)) for number, _ in enumerate(prompts)]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr(parlay, "LLM", FakeLLM)
    return FakeLLM


@pytest.fixture(autouse=True)
def _restore_log_level() -> Iterator[None]:
    logger = logging.getLogger("parlay")
    level = logger.level
    yield
    logger.setLevel(level)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("7kb", 7000), ("8b", 8)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "3x", "1e9", "0", "0.1"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_bytes(text)


def test_help_is_instant_and_complete() -> None:
    started = time.perf_counter()
    program = "import sys; from parlay.cli import app; app(['--help'])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 2.0  # without torch about 0.3; wide, for busy machines
    for command in ("serve", "generate", "pull", "demo", "bench", "profile", "--version"):
        assert command in answer.stdout


def test_version() -> None:
    assert run("--version").stdout == f"parlay {parlay.__version__}\n"


def test_no_command_shows_the_help() -> None:
    answer = run()
    assert "serve" in answer.output
    assert "error" not in answer.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["serve", "--wings", "2"],
        ["serve", "--port", "high"],
        ["serve", "--kv-cache-memory", "3x"],
        ["serve", "--speculation", "prompt_lookup:deep"],
        ["serve", "--speculation", "prompt_lookup:[3]"],
        ["serve", "--parity", "loose"],
        ["serve", "--max-num-batched-tokens", "3"],
        ["generate", "--top-p", "3", "hi"],
        ["generate", "--file", "/nowhere"],
        ["generate"],
        ["pull", "gpt2"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str]) -> None:
    answer = run(*arguments)
    assert answer.exit_code == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert len(answer.stderr) > len("error: \n")


def test_serve_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("parlay.server.app.serve", lambda config, **rest: seen.update(rest, config=config))
    monkeypatch.setenv("PARLAY_API_KEY", "secret")
    answer = run(
        *("serve", "-m", "some/model", "--port", "9", "--served-model-name", "m", "--dtype", "float32"),
        *("--max-num-seqs", "4", "--max-model-len", "99", "--max-num-batched-tokens", "64", "--page-size", "8"),
        *("--kv-cache-memory", "1MiB", "--speculation", "prompt_lookup:[-1,-1,0]", "--parity", "strict"),
        *("--seed", "7", "--no-prefix-caching", "--no-self-check", "--device", "cpu", "--compile", "off"),
        *("--served-model-name", "other", "--max-queue-size", "5", "--max-body-size", "2kB", "--access-log"),
        *("--policy", "fixed:2", "--calibrate", "full", "--record", "trace.jsonl"),
    )
    assert answer.exit_code == 0, answer.output
    config = seen.pop("config")
    assert seen == {
        "host": "127.0.0.1",
        "record": Path("trace.jsonl"),
        "port": 9,
        "served_model_names": ["m", "other"],
        "api_key": "secret",
        "max_queue_size": 5,
        "max_body_bytes": 2000,
        "access_log": True,
    }
    assert config == EngineConfig(
        model="some/model",
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=99,
        kv_cache_memory=1 << 20,
        page_size=8,
        prefix_caching=False,
        speculation=Bet("prompt_lookup", Tree((-1, -1, 0))),
        parity="strict",
        seed=7,
        self_check=False,
        compile="off",
        policy="fixed:2",
        calibrate="full",
    )


def test_the_defaults_are_the_engines_own(llm: type[FakeLLM]) -> None:
    assert run("generate", "hi").exit_code == 0
    assert llm.config == EngineConfig(model="smollm2-135m", speculation=parse_bet("auto"))
    assert llm.calls == [("chat", [user("hi")], SamplingParams(max_tokens=256))]


def test_speculation_off(llm: type[FakeLLM]) -> None:
    assert run("generate", "hi", "--speculation", "off").exit_code == 0
    assert llm.config.speculation is None


def test_generate_prints_text_and_a_line_of_numbers(llm: type[FakeLLM]) -> None:
    answer = run("generate", "--no-chat", "a", "b", "--temperature", "0", "--request-seed", "3", "--stop", "x")
    assert answer.stdout == "fine\nfine\n"
    assert "8 tokens in" in answer.stderr
    assert "2.00 per step" in answer.stderr
    assert llm.calls == [
        ("generate", ["a", "b"], SamplingParams(max_tokens=256, temperature=0, seed=3, stop=("x",))),
    ]


def test_generate_reads_every_form_of_line(llm: type[FakeLLM], tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    lines = [
        "plain",
        "",
        '"a\\nb"',
        '{"prompt": "c"}',
        json.dumps({"messages": user("d")}),
        json.dumps(user("e")),
        "[x",
    ]
    file.write_text("\n".join(lines))
    assert run("generate", "first", "--file", str(file)).exit_code == 0
    assert llm.calls[0][1] == [user(text) for text in ("first", "plain", "a\nb", "c", "d", "e", "[x")]


@pytest.mark.parametrize("arguments", [[], ["--file", "-"]])
def test_generate_reads_standard_input(llm: type[FakeLLM], arguments: list[str]) -> None:
    answer = run("generate", "--json", *arguments, stdin="one\ntwo\n")
    assert llm.calls[0][1] == [user("one"), user("two")]
    outputs = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [output["outputs"][0]["text"] for output in outputs] == ["fine", "fine"]


@pytest.mark.parametrize("line", ['{"question": "?"}', "[1, 2]", "[]"])
def test_json_that_is_no_prompt_is_refused(llm: type[FakeLLM], line: str) -> None:
    answer = run("generate", stdin=line)
    assert answer.exit_code == 2
    assert "JSON prompt" in answer.stderr


def test_messages_need_the_chat_template(llm: type[FakeLLM]) -> None:
    answer = run("generate", "--no-chat", stdin=json.dumps(user("hi")))
    assert answer.exit_code == 2
    assert "leave --no-chat out" in answer.stderr


def test_pull_prints_the_folder_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parlay.engine.checkpoint.pull", lambda name: Path("/models") / name)
    assert run("pull").stdout == "/models/smollm2-135m\n"
    assert json.loads(run("pull", "--json").stdout.splitlines()[-1]) == {"path": "/models/smollm2-135m"}
