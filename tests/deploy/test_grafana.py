"""The Grafana dashboard asks for nothing that the server does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from tests.serving import MODEL, serving
from tests.tiny import make_tiny_llama

BOARD: dict[str, Any] = json.loads(Path("deploy/grafana/parlay.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What /metrics says after a request with bets: names, with their labels."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    engine = Engine(EngineConfig(str(folder), dtype="float32", device="cpu", self_check=False, compile="off"))
    body = {
        "model": MODEL,
        "prompt": "the and of the and of the",
        "max_tokens": 100,
        "temperature": 0,
        "ignore_eos": True,
    }
    body["speculation"] = "suffix:2"
    with serving(engine) as server:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if not family.samples:  # none of its labels has a value yet
            found[f"{family.name}_total"] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queried() -> Iterator[str]:
    for expression in (*EXPRESSIONS, BOARD["templating"]["list"][1]["query"]["query"]):
        yield from re.findall(r"parlay:\w+", expression)


def test_every_metric_that_is_queried_exists(samples: dict[str, set[str]]) -> None:
    names = set(queried())
    assert len(names) > 20
    assert sorted(names - samples.keys()) == []


def test_every_label_that_is_grouped_by_exists(samples: dict[str, set[str]]) -> None:
    told = set().union(*samples.values()) | {"method"}
    for expression in EXPRESSIONS:
        for labels in re.findall(r"(?:by|on) \(([\w, ]+)\)", expression):
            assert set(labels.split(", ")) <= told, expression


def test_every_metric_is_shown(samples: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in queried()}
    told = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in samples}
    assert sorted(told - shown) == []


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in BOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) == 23
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
