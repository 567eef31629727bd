"""Predictive pipelined decoding: plain greedy output token by token, whatever is begun ahead of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from parlay.bets import Bet, Tree, parse_bet
from parlay.cli import app
from parlay.config import EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.drafters.exit_part import save_exit
from parlay.drafters.pipelined import Pipelined
from parlay.engine import compute_unit, pipelined
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel
from parlay.engine.pipelined import Tally
from parlay.policy.cost import DraftCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.types import Offer, Request, Row, RowResult, SamplingParams
from tests.architectures import make_model
from tests.drafting import tiny_exit

PROMPTS = [tuple(range(3, 20)), (5, 6, 7, 5, 6, 7, 5), tuple(range(40, 72))]
MANY = 32  # of a vocabulary of 300: so many often match


def engine(folder: Path, bet: str | None, source: str | None = None, **settings: Any) -> Engine:
    drafters = {"ppd": source} if source else {}
    speculation = parse_bet(bet) if bet else None
    config = EngineConfig(
        str(folder), dtype="float64", device="cpu", compile="off", self_check=False, speculation=speculation,
        drafters=drafters, **settings,
    )  # fmt: skip
    return Engine(config)


def answers(some: Engine, prompts: Sequence[tuple[int, ...]], late: int = 0, **params: Any) -> list[list[int]]:
    """All at once, but for those that come `late` steps after the one before."""
    found: dict[str, list[int]] = {}
    settings = SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True, **params})
    for number, prompt in enumerate(prompts):
        some.add(Request(str(number), prompt, settings))
        for _ in range(late):
            for delta in some.step():
                found.setdefault(delta.request_id, []).extend(delta.tokens)
    while some.has_work:
        for delta in some.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
    some.check_integrity()
    return [found[str(number)] for number in range(len(prompts))]


def tally(some: Engine) -> Tally:
    assert some.model.pipeline is not None
    return some.model.pipeline.tally


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("candidates", [1, 3, MANY])
def test_output_is_that_of_plain_decoding(architecture: str, candidates: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path, architecture, layers=5)
    plain, ahead = engine(folder, None), engine(folder, f"ppd:{candidates}", "3")
    for prompts, late in ((PROMPTS[:1], 0), (PROMPTS, 0), (PROMPTS, 7)):
        assert answers(ahead, prompts, late) == answers(plain, prompts, late)
    assert tally(ahead).forks > 0
    assert candidates != MANY or tally(ahead).matches > 20
    assert 0 < tally(ahead).layers <= 3 * tally(ahead).matches, "no unit runs beyond the exit"


def test_a_trained_exit_reads_off_other_candidates(tmp_path: Path) -> None:
    folder, part = make_model(tmp_path / "model", "llama", layers=4), tmp_path / "exit"
    exit = tiny_exit(exit=2, layers=4)
    exit.down.weight.data *= 100
    save_exit(exit, part, "tiny", int8=False)
    raw, trained = engine(folder, "ppd:2", "2"), engine(folder, "ppd:2", str(part))
    assert answers(raw, PROMPTS) == answers(trained, PROMPTS) == answers(engine(folder, None), PROMPTS)
    assert tally(raw).matches != tally(trained).matches


def test_rows_that_sample_are_decoded_plainly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_model(tmp_path, "llama", layers=4)
    ahead = engine(folder, "ppd:3", "2")
    assert answers(ahead, PROMPTS, temperature=0.8, seed=5) == answers(
        engine(folder, None), PROMPTS, temperature=0.8, seed=5
    )
    assert tally(ahead).forks == 0
    assert caplog.text.count("are decoded plainly") == 1


def test_penalties_and_small_pools_change_nothing(tmp_path: Path) -> None:
    """What is begun follows from raw logits; rows are preempted; outputs end at every place of a page."""
    folder = make_model(tmp_path, "llama", layers=4)
    kept: dict[str, Any] = {"page_size": 4, "kv_cache_memory": 120_000}
    plain, ahead = engine(folder, None, **kept), engine(folder, f"ppd:{MANY}", "2", **kept)
    for penalty in (0.0, 1.5):
        assert answers(ahead, PROMPTS, frequency_penalty=penalty) == answers(plain, PROMPTS, frequency_penalty=penalty)
    for count in range(1, 9):
        assert answers(ahead, PROMPTS, max_tokens=count) == answers(plain, PROMPTS, max_tokens=count)
    assert tally(ahead).matches


def test_head_starts_outlive_the_end_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A match is begun with wherever its place lies, but for the last one of a text."""
    advance = pipelined.Lane.advance
    monkeypatch.setattr(pipelined.Lane, "advance", lambda lane, end, *_: advance(lane, end))  # however long it takes
    some = engine(make_model(tmp_path, "llama", layers=4), f"ppd:{MANY}", "2", page_size=1)
    answers(some, PROMPTS[:1])
    assert tally(some).layers in (2 * tally(some).matches, 2 * (tally(some).matches - 1))
    assert tally(some).matches > 10


def test_only_the_size_of_a_bet_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, begin = make_model(tmp_path, "llama", layers=4), pipelined.Pipeline._begin
    begun: list[int] = []

    def noting(line: Any, rows: Any, candidates: Sequence[int], *given: Any) -> Any:
        begun[-1] = max(begun[-1], *candidates, 0)
        return begin(line, rows, candidates, *given)

    monkeypatch.setattr(pipelined.Pipeline, "_begin", noting)
    for bet in ("ppd:3", "ppd:[-1,-1,-1]"):
        begun.append(0)
        answers(engine(folder, bet, "2"), PROMPTS)
    assert begun == [3, 3]


class Watch(Drafter):
    """Notes the target's states, as heads do."""

    name = "watch"
    taps = (0, 1, 2, 3, 4, 5)

    def __init__(self) -> None:
        self.states: dict[int, list[torch.Tensor]] = {tap: [] for tap in self.taps}

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        return [None] * len(rows)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        return [None] * len(rows)

    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        for tap in self.taps:
            self.states[tap].append(taps[tap].clone())


def test_tapped_states_are_those_of_plain_decoding(tmp_path: Path) -> None:
    """Also of layers that another unit has done."""
    folder, seen = make_model(tmp_path, "llama", layers=4), []
    for begins in (False, True):
        watch = Watch()

        def both(loaded: LoadedModel, watch: Watch = watch) -> Drafters:
            return Drafters([watch, Pipelined(MANY, 2)])

        bet = Bet("ppd", Tree.chain(MANY)) if begins else None
        config = EngineConfig(
            str(folder), dtype="float64", device="cpu", compile="off", self_check=False, speculation=bet
        )
        some = Engine(config, drafters=both)
        answers(some, PROMPTS[:2])
        assert (tally(some).matches > 0) is begins
        seen.append(watch.states)
    for tap in Watch.taps:
        torch.testing.assert_close(torch.cat(seen[0][tap]), torch.cat(seen[1][tap]))


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama", layers=4)
    with pytest.raises(ValueError, match="upper half, from layer 2 to 3"):
        engine(folder, "ppd:2", "1")
    for below in ("0", "1"):
        measured = CliRunner().invoke(app, ["measure", "--ppd", "--model", str(folder), "--exit", below])
        assert measured.exit_code
        assert "upper half" in measured.output or "exit" in measured.output
    with pytest.raises(ValueError, match="leave one of them out"):
        engine(folder, "ppd:2", "2", parity="strict")
    with pytest.raises(ValueError, match="leave --offload out"):
        engine(folder, "ppd:2", "2", offload="disk", memory_budget=150_000)
    monkeypatch.setattr(compute_unit, "cores", lambda: [0])
    with pytest.raises(ValueError, match="second core"):
        engine(folder, "ppd:2", "2")


def test_goodput_begins_next_tokens_where_that_was_measured_to_be_faster(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", layers=4)
    verify = VerifyCost((1, 512), (0.01, 0.02))

    def policy(ratio: float) -> Goodput:
        return Goodput(Profile("m", "m", "f", verify, {"ppd": DraftCost(ahead=((1, ratio), (4, 2.0)))}))

    some = engine(folder, "ppd:3", "2")
    plain = answers(engine(folder, None), PROMPTS)
    for ratio, begins in ((0.5, True), (1.5, False)):
        some.policy, before = policy(ratio), tally(some).forks
        assert [answers(some, [prompt])[0] for prompt in PROMPTS] == plain
        assert (tally(some).forks > before) is begins
    some.policy, before = policy(0.5), tally(some).forks
    assert answers(some, [*PROMPTS, PROMPTS[0][1:]])[:3] == plain
    assert tally(some).forks == before or len(PROMPTS) < 3, "four rows are faster without"


def test_every_thread_gets_its_cores_back(tmp_path: Path) -> None:
    """After the last request, however it ends."""
    some = engine(make_model(tmp_path, "llama", layers=4), "ppd:3", "2")
    before = torch.get_num_threads(), compute_unit.cores()
    answers(some, PROMPTS)
    assert tally(some).forks
    assert (torch.get_num_threads(), compute_unit.cores()) == before
    some.add(Request("left", PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
    for _ in range(5):
        some.step()
    some.abort("left")
    assert (torch.get_num_threads(), compute_unit.cores()) == before


@pytest.mark.failures
def test_a_unit_that_fails_costs_nobody_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(tmp_path, "llama", layers=4)
    some, calls, begin = engine(folder, "ppd:3", "2"), [], pipelined.Pipeline._begin

    def breaks(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return begin(*given)

    monkeypatch.setattr(pipelined.Pipeline, "_begin", breaks)
    assert answers(some, PROMPTS) == answers(engine(folder, None), PROMPTS)
    assert some.status().failed_drafters == ("ppd",)
    assert "out of memory" in caplog.text
