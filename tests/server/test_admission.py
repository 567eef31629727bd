"""How many may wait, and what those hear who may not."""

from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest

from parlay.server.admission import LONGEST_RETRY, QueueFull, QueueLimit
from parlay.types import EngineStatus
from tests.server.stand_in import StandIn
from tests.serving import MODEL, Server, serving, until


def limit(max_waiting: int) -> tuple[QueueLimit, list[float]]:
    """A limit and the clock it reads."""
    now = [100.0]
    return QueueLimit(max_waiting, clock=lambda: now[0]), now


def refusal(queue: QueueLimit, status: EngineStatus, choices: int = 1) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        queue.check(status, choices)
    return caught.value


def test_what_runs_and_what_waits_bound_what_is_taken() -> None:
    queue, _ = limit(2)
    queue.check(EngineStatus(slots=4), 6)
    queue.check(EngineStatus(slots=4, running=4, waiting=1), 1)
    queue.check(EngineStatus(slots=4, running=0, waiting=5), 1)  # added since the last step: four of them will run
    refusal(queue, EngineStatus(slots=4, running=4, waiting=2))
    refusal(queue, EngineStatus(slots=4, running=4, waiting=1), 2)


def test_a_call_larger_than_the_limit_is_taken_when_nothing_waits() -> None:
    queue, _ = limit(2)
    queue.check(EngineStatus(slots=4), 7)
    queue.check(EngineStatus(slots=4, running=4), 7)
    refusal(queue, EngineStatus(slots=4, running=4, waiting=1), 7)


def test_a_call_of_unknown_size_is_refused_when_no_size_fits() -> None:
    queue, _ = limit(2)
    queue.check_any(EngineStatus(slots=4, running=4, waiting=1))
    with pytest.raises(QueueFull):
        queue.check_any(EngineStatus(slots=4, running=4, waiting=2))
    limit(0)[0].check_any(EngineStatus(slots=4, running=4))  # one of five choices would be taken


def test_finishes_of_one_thread_wait_for_the_question_of_another() -> None:
    now = [100.0]
    finisher = threading.Thread(target=lambda: queue.finished(1))
    waited: list[bool] = []

    def clock() -> float:
        if threading.current_thread() is threading.main_thread() and not waited and finisher.ident is None:
            finisher.start()
            finisher.join(0.05)
            waited.append(finisher.is_alive())
        return now[0]

    queue = QueueLimit(0, clock)
    refusal(queue, EngineStatus(slots=4, running=4))
    finisher.join()
    assert waited == [True]


def test_the_time_to_come_back_follows_how_fast_choices_finish() -> None:
    queue, now = limit(0)
    full = EngineStatus(slots=4, running=4)
    assert refusal(queue, full).retry_after == LONGEST_RETRY  # nothing has ever finished
    queue.finished(5)
    now[0] += 10
    assert refusal(queue, full).retry_after == 2  # one in two seconds
    assert refusal(queue, full, choices=4).retry_after == 8
    queue.finished(200)
    assert refusal(queue, full).retry_after == 1
    now[0] += 61
    assert refusal(queue, full).retry_after == LONGEST_RETRY


def test_a_full_queue_answers_429_and_takes_calls_again_later() -> None:
    engine = StandIn(paced=True)
    with serving(engine, max_queue_size=2) as server, server.client() as client, server.http() as http:
        body = {"prompt": "abc", "max_tokens": 1}
        threads = [ask_in_background(server, n) for n in (4, 1)]
        until(lambda: server.worker.status.waiting == 1)
        assert http.post("/v1/completions", json={**body, "n": 2}).status_code == 429
        assert 'parlay:request_refused_total{model_name="tiny"} 2.0' in http.get("/metrics").text
        threads.append(ask_in_background(server, 1))
        for content in (json.dumps(body), "not JSON"):  # nobody reads what nobody will take
            answer = http.post("/v1/completions", content=content)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == str(LONGEST_RETRY)
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "try again in 60 seconds" in error["message"]
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True)
        assert len(engine.live) == 3
        assert 'parlay:request_refused_total{model_name="tiny"} 5.0' in http.get("/metrics").text
        assert engine.pace is not None
        engine.pace.release(2)
        for thread in threads:
            thread.join()
        assert http.post("/v1/completions", json=body).status_code == 200


def test_several_prompts_of_one_call_are_refused_together() -> None:
    engine = StandIn(paced=True)
    with serving(engine, max_queue_size=1) as server, server.http() as http:
        thread = ask_in_background(server, 4)
        until(lambda: server.worker.status.running == 4)
        answer = http.post("/v1/completions", json={"prompt": ["a", "b"]})
        assert answer.status_code == 429
        assert len(engine.live) == 1
        assert engine.pace is not None
        engine.pace.release()
        thread.join()


def ask_in_background(server: Server, n: int) -> threading.Thread:
    """A call for n choices of one token each."""

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            answer = http.post("/v1/completions", json={"prompt": "abc", "n": n, "max_tokens": 1})
            assert len(answer.json()["choices"]) == n

    before = server.worker.status.running + server.worker.status.waiting
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.worker.status.running + server.worker.status.waiting == before + n)
    return thread
