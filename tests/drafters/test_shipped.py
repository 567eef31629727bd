"""The drafters that come with the package are whole, small, and found by model and method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parlay import registry
from parlay.drafters import shipped as package
from parlay.drafters.shipped import shipped
from parlay.engine.checkpoint import BUILT_IN

FOLDERS = [Path(shape).parent for shape in Path(str(package.__file__)).parent.glob("*/*/config.json")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name} {folder.name}")
def test_it_is_whole_and_small(folder: Path) -> None:
    assert folder.parent.name in BUILT_IN
    assert registry.drafters.find(folder.name).name == folder.name
    assert shipped(folder.parent.name, folder.name) == str(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["kind"] == folder.name
    assert sum(card["evaluations"][-1]["accepted"]) > sum(card["evaluations"][0]["accepted"])
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# A drafter for")


def test_others_have_none() -> None:
    assert shipped("smollm2-135m", "no method") is None
    assert shipped("/", "tmp") is None
    assert shipped("", "..") is None
