"""Who may import whom, and who must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted((SOURCE / "parlay").rglob("*.py"))

# A module may import its own layer and those before it; `leaves` import anything and nothing imports them.
LAYERS = (
    ("bets", "types", "config", "registry"),
    ("policy",),
    ("engine", "drafters"),
    ("server",),
    ("options", "cli", "demo"),
    ("__main__",),
)
LEAVES = ("integrations", "bench", "train", "verify")
TALKS_TO_TRANSFORMERS = {f"parlay.engine.{name}" for name in ("model", "attention", "checkpoint", "products")}
LIGHT = ("parlay", "parlay.bets", "parlay.types", "parlay.cli", "parlay.engine.scheduler", "parlay.engine.blocks")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top, in a function or for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """`parlay.engine.kv` belongs to the part `engine`; `parlay` itself to the empty one."""
    return [*name.split("."), ""][1]


def layer(name: str) -> int:
    found = [rank for rank, parts in enumerate(LAYERS) if part(name) in parts]
    assert found, f"{name}: give {part(name)!r} a place in LAYERS"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_import_direction(path: Path) -> None:
    importer = module_name(path)
    targets = {name for name in imports(path) if name.split(".")[0] == "parlay" and name != "parlay.__version__"}
    if part(importer) in LEAVES or importer == "parlay":
        return
    for target in targets:
        if part(target) in LEAVES:
            assert importer == "parlay.cli", f"{importer} imports {target}, which only the command line may start"
            continue
        public_name = part(target)[:1].isupper()
        rank = layer("parlay.cli") if public_name else layer(target)  # `from parlay import LLM` is for the top only
        assert rank <= layer(importer), f"{importer} imports {target}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_few_modules_talk_to_transformers(path: Path) -> None:
    if module_name(path) not in TALKS_TO_TRANSFORMERS and part(module_name(path)) not in LEAVES:
        assert not [name for name in imports(path) if name.split(".")[0] == "transformers"]


def test_light_modules_import_no_torch() -> None:
    """One process imports them one after the other, until the first that is not light."""
    light = [*LIGHT, *(name for name in map(module_name, FILES) if name.startswith("parlay.policy"))]
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if {"torch", "transformers"} & set(sys.modules):
        sys.exit(f"{name} imports torch or transformers")
"""
    found = subprocess.run([sys.executable, "-c", program, *light], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
