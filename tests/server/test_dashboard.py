"""The dashboard: its page, its events, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.engine.monitor import Monitor
from parlay.server import dashboard
from tests.serving import MODEL, Server, serving, until
from tests.tiny import make_tiny_llama

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    options: dict[str, Any] = {"self_check": False, "compile": "off", "max_num_seqs": 16}
    return Engine(EngineConfig(str(folder), dtype="float64", device="cpu", **options))


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with serving(engine, monitor=Monitor(engine)) as running:
        yield running


def ask(server: Server, count: int, tokens: int, key: dict[str, str] | None = None) -> threading.Thread:
    """Sends so many prompts at once and waits for the answers on another thread."""
    body = {
        "model": MODEL, "prompt": ["the and of the and of"] * count, "max_tokens": tokens, "ignore_eos": True,
        "temperature": 0, "speculation": "suffix:3",
    }  # fmt: skip
    url = f"{server.url}/v1/completions"
    thread = threading.Thread(target=lambda: httpx.post(url, json=body, headers=key, timeout=100).raise_for_status())
    thread.start()
    return thread


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_the_page_needs_nothing_else_and_lets_nothing_else_run(server: Server) -> None:
    first, second = (httpx.get(f"{server.url}/dashboard") for _ in range(2))
    assert first.headers["content-type"].startswith("text/html")
    policy = first.headers["content-security-policy"]
    (nonce,) = re.findall(r"script-src 'nonce-([\w-]+)'", policy)
    assert "default-src 'none'" in policy
    assert nonce not in second.text
    assert first.text.count(f'nonce="{nonce}"') == first.text.count("<script") + first.text.count("<style") == 2
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", first.text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", first.text)
    assert "/* S" not in first.text


def test_events_say_how_it_stands_and_then_what_is_new(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "EVERY", 0.3)
    waiting = ask(server, 3, 60)
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer)
        first = next(told)
        assert first["policy"] == "auto"
        assert first["slots"] == 16
        assert {line["prompt"] for line in first["requests"]} <= {6, 7}
        seen = [point["at"] for point in first["points"]]
        for _ in range(8):
            seen += [point["at"] for point in next(told)["points"]]
    waiting.join()
    assert seen == sorted(set(seen))
    until(lambda: _watched(server) == 0)


def _watched(server: Server) -> int:
    """Who looks on now, by how many more may."""
    with ExitStack() as open_ones:
        reading = []  # one that nobody reads any more is closed
        for more in range(dashboard.MOST + 1):
            url = f"{server.url}/dashboard/events"
            answer = open_ones.enter_context(httpx.stream("GET", url, timeout=60))
            if answer.status_code == 429:
                assert json.loads(answer.read())["error"]["code"] == "too_many_dashboards"
                return dashboard.MOST - more
            reading.append(events(answer))
            next(reading[-1])
    raise AssertionError("as many may look on as want to")


def test_only_so_many_look_on(server: Server) -> None:
    until(lambda: _watched(server) == 0)


def test_events_ask_for_the_key_and_the_page_does_not(engine: Engine) -> None:
    with serving(engine, api_key="sesame", monitor=Monitor(engine)) as guarded:
        assert httpx.get(f"{guarded.url}/dashboard").status_code == 200
        assert httpx.get(f"{guarded.url}/dashboard/events").status_code == 401
        with httpx.stream("GET", f"{guarded.url}/dashboard/events", headers=KEY, timeout=60) as answer:
            assert next(events(answer))["requests"] == []


def test_who_looks_on_does_not_keep_the_server_from_ending(engine: Engine) -> None:
    began = time.monotonic()
    with serving(engine, grace=60, monitor=Monitor(engine)) as ending, ExitStack() as stack:
        answer = stack.enter_context(httpx.stream("GET", f"{ending.url}/dashboard/events", timeout=60))
        told = events(answer)
        next(told)
        ending.stop()
        assert len(list(told)) < 10
    assert time.monotonic() - began < 50


def test_a_failed_engine_says_so(engine: Engine) -> None:
    with serving(engine, monitor=Monitor(engine)) as broken:
        broken.worker.failure = "the engine failed: a test"
        answer = httpx.get(f"{broken.url}/dashboard/events", timeout=60)
    assert answer.text.startswith("event: failed\n")
    assert next(events(answer)) == {"reason": "the engine failed: a test"}


# ---- in a browser ---------------------------------------------------------------------------------------------------

pytest_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a phone's width, which must never complain nor be wider than the phone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        yield page
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert [text for text in said if "401" not in text] == []
    assert wide <= 390


@pytest_browser
def test_with_no_request(server: Server, page: Any) -> None:
    page.goto(f"{server.url}/dashboard")
    page.get_by_text("policy auto").wait_for()
    assert page.get_by_text("No request runs or waits.").is_visible()
    assert page.locator("figure").count() == 9
    assert page.locator("#tiles dt").first.inner_text() == "Tokens per second"


@pytest_browser
def test_with_two_hundred_requests(server: Server, page: Any) -> None:
    page.goto(f"{server.url}/dashboard")
    waiting = [ask(server, 50, 150) for _ in range(4)]
    waits = page.locator("#tiles div", has_text="Waiting").locator("dd")
    until(lambda: page.locator("#rows tr").count() == 16)
    until(lambda: int(waits.inner_text().split()[0]) > 100)
    until(lambda: page.locator("#rows svg").count() > 0)
    assert re.fullmatch(
        r"\d+ guesses, \d+ deep, \d+ accepted", page.locator("#rows svg").first.get_attribute("aria-label")
    )
    plot = page.get_by_role("img", name="Tokens per step")
    until(lambda: re.search(r"now: tokens \d", plot.locator("xpath=..").inner_text()) is not None)
    plot.focus()
    page.keyboard.press("Home")
    assert re.search(r"\d+ s ago: tokens|now: tokens", plot.locator("xpath=../p[@class='readout']").inner_text())
    page.get_by_role("button", name="Pause").click()
    assert page.get_by_role("button", name="Go on").get_attribute("aria-pressed") == "true"
    assert page.locator("#state").inner_text().startswith("paused; policy auto")
    for thread in waiting:
        thread.join()


@pytest_browser
def test_every_picture_has_a_name_and_every_control_a_label(server: Server, page: Any) -> None:
    page.goto(f"{server.url}/dashboard")
    page.get_by_text("policy auto").wait_for()
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every(some => some.getAttribute('aria-label'))")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.id"))
    assert reached == ["pause", *["plot"] * 9, "scroll"]


@pytest_browser
def test_the_key_is_asked_for(engine: Engine, page: Any) -> None:
    with serving(engine, api_key="sesame", monitor=Monitor(engine)) as guarded:
        page.goto(f"{guarded.url}/dashboard")
        for key, text in (("wrong", "the key is wrong"), ("sesame", "policy auto")):
            page.get_by_label("This server asks for its API key").fill(key)
            page.get_by_role("button", name="Show").click()
            page.get_by_text(text).wait_for()
        assert page.locator("#key").is_hidden()
