"""Sizes, public names and documents that must agree with the code."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import parlay
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]
DEFAULT_MODEL = "smollm2-135m"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short() -> None:
    files = [path for kind in ("py", "h", "cpp", "js", "css", "html") for path in (ROOT / "src").rglob(f"*.{kind}")]
    long = {str(path.relative_to(ROOT)): lines(path) for path in files if lines(path) >= 400}
    assert not long


def test_public_names() -> None:
    assert sorted(parlay.__all__) == sorted(
        ["LLM", "CompletionOutput", "EngineConfig", "InvalidRequest", "RequestOutput", "SamplingParams", "__version__"]
    )
    for name in parlay.__all__:
        assert getattr(parlay, name) is not None
    assert parlay.LLM.__module__ == "parlay.engine.llm"
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        parlay.Engine  # type: ignore[attr-defined]  # noqa: B018


def test_cli_reference_is_up_to_date() -> None:
    render = runpy.run_path(str(ROOT / "scripts" / "cli_docs.py"))["render"]
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == render(), "run: .venv/bin/python scripts/cli_docs.py > docs/cli.md"


def test_architecture_is_one_page() -> None:
    page = ROOT / "docs" / "architecture.md"
    assert not page.exists() or lines(page) <= 80


@pytest.mark.timeout(300)  # on a new machine the operators are compiled first
def test_readme_python_runs(tmp_path: Path) -> None:
    """Every block marked as python runs as written, in order, with a tiny model instead of the default one."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    if blocks:
        model = str(make_tiny_llama(tmp_path / "model"))
        program = "\n".join(blocks).replace(DEFAULT_MODEL, model)
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=280)
