"""What is lossless is so on a model's layers as they are, and on compiled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parlay.engine import native
from parlay.engine.checkpoint import cache_dir


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the layers of tiny models, with the operators that are already there."""
    folder, operators = tmp_path_factory.mktemp("cache"), cache_dir() / "native"
    (folder / "native").symlink_to(operators, target_is_directory=True)
    return folder


@pytest.fixture
def compiled(compiled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of an engine with compiled layers, which are compiled once for a kind of layer."""
    if native.compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("PARLAY_CACHE", str(compiled_cache))
    return {"dtype": "float32", "compile": "wait"}


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.timeout(400))])
def layers(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of an engine with either kind of layers."""
    return {"dtype": "float64"} if request.param == "eager" else request.getfixturevalue("compiled")
