from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy.trees import expected_emitted
from parlay.policy.workload import Kind, Phase, Recorded, Workload, arrivals, draw, mixture, read_kinds, read_trace

LENGTHS = np.array([10, 20]), np.array([3, 4])


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_spread_that_were_asked_for(cv: float) -> None:
    times = arrivals([Phase(4000, 5)], cv, np.random.default_rng(0))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_bursts_do_not_begin_with_the_first_request() -> None:
    counts = [arrivals([Phase(500, 2)], 5.0, np.random.default_rng(seed)) for seed in range(300)]
    assert np.mean([len(times) for times in counts]) == pytest.approx(1000, rel=0.05)
    assert np.mean([(times < 50).sum() for times in counts]) == pytest.approx(100, rel=0.2)


def test_phases_have_their_own_rates_and_kinds() -> None:
    kinds = (Kind("prose", 1.0, {}), Kind("code", 0.0, {}))
    phases = [Phase(100, 2), Phase(100, 0), Phase(100, 20, shares=(0.0, 1.0))]
    work = draw(phases, LENGTHS, kinds, seed=1)
    assert (work.arrival < 100).sum() == pytest.approx(200, rel=0.2)
    assert ((work.arrival >= 100) & (work.arrival < 200)).sum() == 0
    assert (work.arrival >= 200).sum() == pytest.approx(2000, rel=0.1)
    assert set(work.kind[work.arrival < 100]) == {0}
    assert set(work.kind[work.arrival >= 200]) == {1}
    assert set(zip(work.prompt.tolist(), work.output.tolist(), strict=True)) == {(10, 3), (20, 4)}


def test_a_mixture_expects_what_its_kinds_do_on_average() -> None:
    kinds = (Kind("a", 3.0, {"m": np.array([0.9])}), Kind("b", 1.0, {"m": np.array([0.2, 0.1])}))
    for depth in (1, 3, 8):
        apart = 0.75 * expected_emitted(Tree.chain(depth), np.array([0.9])) + 0.25 * expected_emitted(
            Tree.chain(depth), np.array([0.2])
        )
        assert expected_emitted(Tree.chain(depth), mixture(kinds, "m")) == pytest.approx(apart)


def test_recorded_hits_tell_how_often_a_level_hits() -> None:
    record = Recorded(np.array([1, 1, 0, 1, 0, 0], dtype=bool))
    assert record.runs.tolist() == [2, 1, 0, 1, 0, 0]
    assert Kind("x", 1.0, {"m": record}).matrix("m")[:2, 0].tolist() == pytest.approx([3 / 6, 1 / 3])
    assert Recorded(np.array([0, 1, 1], dtype=bool)).runs.tolist() == [0, 2, 1]
    assert Recorded(np.array([1, 0, 1], dtype=bool)).runs.tolist() == [1, 0, 2]  # it goes round
    assert Recorded(np.ones(4, dtype=bool)).runs.tolist() == [4, 4, 4, 4]


def test_acceptances_are_read_from_words_and_files(tmp_path: Path) -> None:
    (kind,) = read_kinds("0.7,0.1", "draft")
    assert kind.acceptance["draft"] == pytest.approx([0.7, 0.1])
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(
            {
                "kinds": [
                    {"name": "code", "share": 2, "acceptance": {"draft": [[0.8, 0.1], [0.7, 0.1]]}},
                    {"name": "chat", "acceptance": {"draft": {"hits": "10"}}},
                ]
            }
        )
    )
    code, chat = read_kinds(str(path), "draft")
    assert (code.share, chat.share) == (2, 1)
    assert code.matrix("draft").shape == (2, 2)
    assert chat.matrix("draft")[0, 0] == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "no json", '{"kinds": []}', '{"kinds": [{"name": "a", "acceptance": {"m": [0.9, 0.2]}}]}',
        '{"kinds": [{"name": "a", "acceptance": {"m": [-0.1]}}]}',
        '{"kinds": [{"name": "a", "acceptance": {"m": []}}]}',
        '{"kinds": [{"name": "a", "acceptance": {"m": {"hits": "012"}}}]}', '{"kinds": [{"name": "a"}]}',
        '{"kinds": [{"name": "a", "share": -1, "acceptance": {"m": [0.5]}}]}',
        '{"kinds": [{"name": "a", "share": 1e999, "acceptance": {"m": [0.5]}}]}',
        '{"kinds": [{"name": "a", "share": "x", "acceptance": {"m": [0.5]}}]}',
        '{"kinds": [{"name": "a", "acceptance": {}}]}',
        '{"kinds": [{"name": "a", "acceptance": {"m": [[0.5], [0.5, 0.1]]}}]}',
    ],
)  # fmt: skip
def test_files_that_are_no_acceptances_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json|a\.m"):
        read_kinds(str(path), "m")


def test_a_trace_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:50.5000000,5,6\n2023-11-16 18:15:46.2500000,374,0\n"
    )
    arrival, (prompt, output) = read_trace(path)
    assert arrival.tolist() == pytest.approx([0, 4.25])
    assert (prompt.tolist(), output.tolist()) == ([374, 5], [1, 6])
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1.5,2,3\nx,2,3\n")
    with pytest.raises(ValueError, match="line 3"):
        read_trace(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needs TIMESTAMP"):
        read_trace(path)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ValueError, match="no request"):
        read_trace(path)


def test_workloads_must_make_sense() -> None:
    with pytest.raises(ValueError, match="must rise"):
        Workload(np.array([1.0, 0.5]), (two := np.ones(2, dtype=np.intp)), two, two)
    with pytest.raises(ValueError, match="every arrival"):
        Workload(np.zeros(2), np.ones(1, dtype=np.intp), np.ones(2, dtype=np.intp), np.zeros(2, dtype=np.intp))
