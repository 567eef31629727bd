"""Layers compiled ahead of time: the same tokens, adopted while serving, and no harm where they cannot be had."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parlay.config import Compile, EngineConfig
from parlay.engine import self_check
from parlay.engine.attention import UnsupportedModel, current_step
from parlay.engine.checkpoint import cache_dir
from parlay.engine.compiled import LayerProgram, Noted
from parlay.engine.engine import Engine
from parlay.engine.path_attention import PathAttention
from parlay.engine.segments import Program
from parlay.types import Request, SamplingParams
from tests.architectures import greedy, make_model, plain_model
from tests.operators import needs_operators

pytestmark = [
    needs_operators,
    pytest.mark.timeout(400),
]
PROMPTS = [(5, 6, 7, 5, 6, 7, 5), tuple(range(3, 60)), (9,), (1, 2, 3, 1, 2)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this module's own, with the operators that are already there."""
    folder, operators = tmp_path_factory.mktemp("cache"), cache_dir() / "native"
    (folder / "native").symlink_to(operators, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARLAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", torch.float32)


@pytest.fixture(scope="module")
def compiled(llama: Path) -> Path:
    """The model, with its layers in the cache; they are taken while requests are answered."""
    engine = engine_of(llama, "background")
    assert programs(engine) == [None, None]
    answers = answer(engine)
    deadline = time.monotonic() + 300
    while engine._compiling:
        assert time.monotonic() < deadline
        assert answer(engine) == answers
    assert all(isinstance(program, LayerProgram) for program in programs(engine))
    assert answer(engine) == answers
    return llama


def engine_of(folder: Path, compile: Compile, **options: object) -> Engine:
    settings = {"model": str(folder), "dtype": "float32", "page_size": 4, "max_num_batched_tokens": 40} | options
    return Engine(EngineConfig.from_dict(settings | {"compile": compile}))


def programs(engine: Engine) -> list[Program | None]:
    return engine.model.segments.programs


def answer(engine: Engine) -> list[tuple[int, ...]]:
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] = found.get(delta.request_id, ()) + delta.tokens
        engine.check_integrity()
    return [found[str(number)] for number in range(len(PROMPTS))]


@pytest.mark.parametrize("speculation", ["off", "auto", "prompt_lookup:[-1,0,0,-1,3]"])
def test_the_same_tokens_as_plain_transformers(compiled: Path, speculation: str) -> None:
    engine = engine_of(compiled, "cached", speculation=speculation)
    assert all(programs(engine)), "the second start finds the layers in the cache"
    plain = plain_model(compiled, torch.float32)
    assert answer(engine) == [greedy(plain, prompt, 24) for prompt in PROMPTS]


def test_layers_can_be_left_as_they_are(compiled: Path) -> None:
    assert not any(programs(engine_of(compiled, "off")))
    assert not any(programs(engine_of(compiled, "cached", parity="strict")))
    assert not any(programs(engine_of(compiled, "cached", dtype="float64")))


def test_another_page_size_is_another_program(compiled: Path) -> None:
    assert not any(programs(engine_of(compiled, "cached", page_size=8)))


def test_programs_that_compute_something_else_are_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = LayerProgram.__call__

    def wrong(program: LayerProgram, hidden: torch.Tensor, noted: Noted, **how: bool) -> torch.Tensor:
        out = honest(program, hidden, noted, **how)
        assert out is not None
        return out * 1.001

    monkeypatch.setattr(LayerProgram, "__call__", wrong)
    assert not any(programs(engine_of(compiled, "cached")))
    assert "the output of layer 0, compiled, differs by" in caplog.text


def test_programs_that_keep_other_kv_are_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = LayerProgram.__call__

    def wrong(program: LayerProgram, hidden: torch.Tensor, noted: Noted, **how: bool) -> torch.Tensor | None:
        out = honest(program, hidden, noted, **how)
        step = current_step()
        assert isinstance(step, PathAttention)
        if program._index == 0:
            step.kv.slots[0][step.paths.slots] *= 1.001
        return out

    monkeypatch.setattr(LayerProgram, "__call__", wrong)
    assert not any(programs(engine_of(compiled, "cached")))
    assert "the KV of layer 0, compiled, differs by" in caplog.text


def test_the_check_notices_a_layer_that_adds_nothing_to_large_states() -> None:
    """In bfloat16, beside numbers so large that their own rounding hides what layers add to them."""
    before = torch.randn(3, 64).to(torch.bfloat16)
    before[:, 5] = 3000
    after = before + torch.randn(3, 64).to(torch.bfloat16)
    self_check.require_close("the output", 0, after, after, before)
    with pytest.raises(UnsupportedModel, match="compiled, differs"):
        self_check.require_close("the output", 0, before, after, before)


def test_programs_that_fail_harm_nobody(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(program: LayerProgram, hidden: torch.Tensor, noted: Noted, **how: bool) -> torch.Tensor:
        raise RuntimeError("the program stumbled")

    monkeypatch.setattr(LayerProgram, "__call__", fail)
    assert not any(programs(engine_of(compiled, "cached")))
    assert "the program stumbled" in caplog.text


def test_a_broken_package_is_removed(compiled: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (package,) = (cache / "compiled").glob("*.pt2")
    whole = package.read_bytes()
    package.write_bytes(whole[:1000])
    assert not any(programs(engine_of(compiled, "cached")))
    assert "cannot be loaded" in caplog.text
    assert not package.exists()
    package.write_bytes(whole)


def test_a_compiler_that_fails_harms_nobody(
    llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    engine = engine_of(llama, "wait", page_size=2)
    assert not any(programs(engine))
    assert "run as they are" in caplog.text
    assert answer(engine)
    assert not list((cache / "compiled").glob("*.exported*"))


def test_a_cache_that_cannot_be_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path / "cache"))
    assert not any(programs(engine_of(llama, "wait")))
    assert "cannot be compiled" in caplog.text


def test_an_exporter_that_fails_without_a_word_harms_nobody(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.export, "export", fail)
    assert not any(programs(engine_of(llama, "wait", page_size=2)))
    assert "and run as they are: AssertionError" in caplog.text


def test_a_full_disk_harms_nobody(
    llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(program: object, path: Path) -> None:
        path.write_bytes(b"as much as fits")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", save)
    engine = engine_of(llama, "wait", page_size=2)
    assert not any(programs(engine))
    assert "No space left" in caplog.text
    assert answer(engine)
    assert not list((cache / "compiled").glob("*.exported*"))


def test_programs_of_another_version_are_left_alone(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    assert not any(programs(engine_of(compiled, "cached")))


@pytest.mark.slow
def test_bfloat16_compiles(llama: Path) -> None:
    engine = engine_of(llama, "wait", dtype="bfloat16")
    assert all(programs(engine))
    assert answer(engine) == answer(engine_of(llama, "cached", dtype="bfloat16", speculation="off"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gpt2", "opt", "stablelm", "phi3", "qwen3", "smollm3"])
def test_architectures_compile(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind, torch.float32)
    engine = engine_of(folder, "wait")
    assert all(programs(engine))
    plain = plain_model(folder, torch.float32)
    assert answer(engine) == [greedy(plain, prompt, 24) for prompt in PROMPTS]
