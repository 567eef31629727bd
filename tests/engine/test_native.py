"""What happens where the C++ operators cannot be had."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from parlay.engine import native


@pytest.fixture(autouse=True)
def nothing_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def load() -> bool:
    return native.load.__wrapped__()


def compile_with(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a shell script the compiler."""
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not load()
    assert "install g++" in caplog.text


def test_a_compiler_that_fails_is_quoted(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_with("echo some noise >&2\necho 'fatal error: no such header' >&2\nexit 1", nothing_loaded, monkeypatch)
    assert not load()
    assert "no such header" in caplog.text
    assert not list((nothing_loaded / "cache" / "native").glob("*.so"))


def test_a_cache_that_cannot_be_written(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (nothing_loaded / "cache").write_text("a file where the folder should be")
    assert not load()
    assert "could not be compiled" in caplog.text


def test_a_library_that_does_not_load(
    nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_with('while [ "$1" != -o ]; do shift; done\necho broken > "$2"', nothing_loaded, monkeypatch)
    assert not load()
    assert "could not be compiled" in caplog.text


@pytest.mark.skipif(platform.machine() != "x86_64" or native.compiler() is None, reason="compiles for other x86")
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64-v4"])
def test_machines_without_products_of_bfloat16_can_compile_it(machine: str) -> None:
    made_by = native.compiler()
    assert made_by is not None
    include = Path(torch.__file__).parent / "include"
    command = [made_by, f"-march={machine}", "-std=c++20", "-Wno-psabi", "-fopenmp", "-fsyntax-only", f"-I{include}"]
    subprocess.run([*command, str(native.SOURCES / "ops.cpp")], check=True, timeout=100)
