"""Watches an engine's steps for those who look at it: the last minutes second by second, and how it stands now.

What it does in a step is counting; what follows from the counts is worked out when somebody asks.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parlay.policy.acceptance import MethodAcceptance
from parlay.policy.goodput import Goodput
from parlay.policy.hindsight import Decoded, regret, seconds_of_choices
from parlay.types import EngineStatus, Row, RowResult, StepReport

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

SECONDS = 300  # that are remembered
LATELY = 60  # of them that are compared with other choices
PASSES = 300  # whose times are shown
SHOWN = 64  # guesses of a request's tree that are shown
OFF = "off"
NOT_YET = EngineStatus(0)


@dataclass(slots=True)
class _Second:
    """What was done in one second."""

    at: int  # on time.perf_counter's clock
    steps: int = 0
    seconds: float = 0.0  # spent on steps
    tokens: int = 0
    emitting: int = 0  # rows that emitted, over all steps
    expected_tokens: float = 0.0  # of the steps for which a plan said what it expected: what it said, and what came
    expected_seconds: float = 0.0
    foreseen_tokens: int = 0
    foreseen_seconds: float = 0.0
    shares: Counter[str] = field(default_factory=Counter)  # rows by method and depth, or off
    trials: Counter[tuple[str, int, bool]] = field(default_factory=Counter)  # by method, level, and whether accepted
    decoded: dict[int, Decoded] = field(default_factory=dict)  # by rows
    status: EngineStatus = NOT_YET
    policy: str = ""

    def written(self) -> dict[str, Any]:
        """As a point of the curves."""
        return {
            "at": self.at,
            "goodput": self.tokens / self.seconds if self.seconds else 0.0,
            "foreseen": self.foreseen_tokens / self.foreseen_seconds if self.foreseen_seconds else None,
            "expected": self.expected_tokens / self.expected_seconds if self.expected_seconds else None,
            "tokens_per_second": self.tokens,
            "tokens_per_step": self.tokens / self.emitting if self.emitting else None,
            "busy": self.seconds,
            "shares": dict(self.shares),
            "running": self.status.running,
            "waiting": self.status.waiting,
            "kv": self.status.kv_usage,
        }


@dataclass(slots=True)
class _Choice:
    """One that has not ended."""

    row: Row
    got: RowResult
    steps: int = 0
    output: int = 0

    def written(self, runs: bool) -> dict[str, Any]:
        """As a line of the table."""
        tree, params = self.got.tree.trim(SHOWN, SHOWN), self.row.request.params
        wish = params.speculation
        return {
            "id": self.row.request.id,
            "choice": self.row.choice,
            "prompt": len(self.row.request.prompt),
            "known": self.row.start + self.row.count,
            "output": self.output,
            "steps": self.steps,
            "runs": runs,
            "wish": wish if isinstance(wish, str) else "own bet",
            "method": self.got.method,
            "depth": self.got.tree.depth,
            "guesses": len(self.got.tree),
            "tree": tree.parents,
            "accepted": [node for node in self.got.accepted if node < len(tree)],
        }


class Monitor:
    """A listener of an engine's steps, on its thread.

    Args:
        engine: What to watch; it is told of every step from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._history: deque[_Second] = deque(maxlen=SECONDS)
        self._passes: deque[tuple[float, int, float]] = deque(maxlen=PASSES)  # when, new tokens with guesses, seconds
        self._load = (1.0, 0.0)  # rows of a step, and their tokens in KV, as a moving average
        self._choices: dict[int, _Choice] = {}
        engine.listeners.append(self.note)

    def note(self, report: StepReport) -> None:
        """Takes a step."""
        second = self._second(int(report.ended))
        rows, seconds = report.rows, sum(report.result.seconds.values())
        guesses = emitting = context = 0
        plain, own = True, report.explored
        for row, got, delta in zip(rows, report.result.rows, report.deltas, strict=True):
            emitted, second.tokens = len(got.emitted), second.tokens + len(delta.tokens)
            emitting, guesses, context = emitting + emitted, guesses + len(got.tree), context + row.start + row.count
            plain, own = plain and row.count == 1 and row.samples, own or row.own_bet is not None
            if emitted:
                second.emitting += 1
                second.shares[f"{got.method}:{got.tree.depth}" if got.method and len(got.tree) else OFF] += 1
            if got.method is not None and got.tree.parents:
                self._count_trials(second, got)
            self._follow(row, got, ended=delta.finish_reason is not None)
        second.steps += 1
        second.seconds += seconds
        second.status, second.policy = self._engine.status(), self._engine.policy_name
        if plain and not own:
            some = second.decoded.setdefault(len(rows), Decoded())
            some.add(Decoded(1, context, emitting, seconds, sum(not row.is_greedy for row in rows)))
        policy = self._engine.policy
        if isinstance(policy, Goodput) and policy.expected.seconds and not own:
            second.expected_tokens += policy.expected.emitted
            second.expected_seconds += policy.expected.seconds
            second.foreseen_tokens += emitting
            second.foreseen_seconds += seconds
        new = sum(row.count for row in rows) + guesses
        self._passes.append((report.ended, new, report.result.seconds.get("verify", 0.0)))
        self._load = tuple(old + 0.05 * (new - old) for old, new in zip(self._load, (len(rows), context), strict=True))

    def snapshot(self) -> dict[str, Any]:
        """How it all stands and what was done in the last minutes, for JSON; called between two steps."""
        engine, policy = self._engine, self._engine.policy
        runs = {seq.seq for seq in engine.scheduler.running}
        self._drop_aborted()
        now = time.perf_counter()
        history = [second for second in self._history if second.at >= now - SECONDS]
        lately = [second for second in history if second.at >= now - LATELY and second.policy == engine.policy_name]
        passes = [(new, 1e3 * seconds) for ended, new, seconds in self._passes if ended >= now - SECONDS]
        adaptive = policy if isinstance(policy, Goodput) else None
        status = engine.status()
        return {
            "now": now,
            "model": engine.config.model,
            "policy": engine.policy_name,
            "slots": status.slots,
            "running": status.running,
            "waiting": status.waiting,
            "kv": status.kv_usage,
            "preemptions": status.preemptions,
            "failed_drafters": status.failed_drafters,
            "paused": adaptive is not None and adaptive.control.paused,
            "points": [second.written() for second in history if second.at < int(now)],
            "acceptance": _by_position(history),
            "calibration": dict(_calibration(adaptive)) if adaptive is not None else {},
            "passes": passes,
            "cost": self._cost(adaptive, passes) if adaptive is not None else None,
            "choices": _compared(adaptive, lately) if adaptive is not None else None,
            "requests": [choice.written(seq in runs) for seq, choice in self._choices.items()],
        }

    def _second(self, at: int) -> _Second:
        if not self._history or self._history[-1].at != at:
            self._history.append(_Second(at))
        return self._history[-1]

    def _follow(self, row: Row, got: RowResult, ended: bool) -> None:
        if ended:
            self._choices.pop(row.seq, None)
            return
        choice = self._choices.get(row.seq)
        if choice is None:
            choice = self._choices[row.seq] = _Choice(row, got)
            if len(self._choices) > 2 * self._engine.config.max_num_seqs:  # some were aborted
                self._drop_aborted()
        choice.row, choice.got = row, got
        choice.steps += len(got.emitted) > 0
        choice.output += len(got.emitted)

    def _drop_aborted(self) -> None:
        live = {seq.seq for seq in self._engine.scheduler.sequences()}
        self._choices = {seq: choice for seq, choice in self._choices.items() if seq in live}

    @staticmethod
    def _count_trials(second: _Second, got: RowResult) -> None:
        """Counts the levels that were tried, by whether one of their guesses was accepted."""
        assert got.method is not None
        won = len(got.accepted)
        for level in range(min(won + 1, got.tree.depth)):
            second.trials[got.method, level, level < won] += 1

    def _cost(self, policy: Goodput, passes: Iterable[tuple[int, float]]) -> dict[str, Any]:
        """The curve of a pass by its new tokens beside as many rows and as much context as lately."""
        rows, context = max(1, round(self._load[0])), round(self._load[1])
        verify, top = policy.clock.profile.verify, max((new for new, _ in passes), default=64)
        places = sorted({round(2 ** (step / 4)) for step in range(4 * math.ceil(math.log2(max(top, 2))) + 1)})
        profiled = [1e3 * verify.at(new, rows, context) for new in places]
        live = [ms * policy.clock.verify.factor(new) for new, ms in zip(places, profiled, strict=True)]
        return {"rows": rows, "context": context, "new": places, "profiled": profiled, "live": live}


def _by_position(history: Iterable[_Second]) -> dict[str, list[dict[str, float]]]:
    """By method: how many drafts reached a level, and at how many of them a guess was accepted there."""
    total: Counter[tuple[str, int, bool]] = Counter()
    for second in history:
        total.update(second.trials)
    found: dict[str, list[dict[str, float]]] = {}
    for method in sorted({method for method, _, _ in total}):
        levels = 1 + max(level for name, level, _ in total if name == method)
        won = [total[method, level, True] for level in range(levels)]
        lost = [total[method, level, False] for level in range(levels)]
        found[method] = [{"tried": a + b, "accepted": a / max(a + b, 1)} for a, b in zip(won, lost, strict=True)]
    return found


def _calibration(policy: Goodput) -> Iterator[tuple[str, Any]]:
    """By method: predicted against accepted, and the mean distance between the two."""
    for name, drafter in sorted(policy.drafters.items()):
        if isinstance(drafter.acceptance, MethodAcceptance) and drafter.acceptance.trials:
            some = drafter.acceptance.reliability
            yield name, {"bins": some.curve, "error": some.error}


def _compared(policy: Goodput, recent: Iterable[_Second]) -> dict[str, Any] | None:
    """What the last minute's decoding took, and what it would have taken without bets and with any fixed one."""
    decoded: dict[int, Decoded] = {}
    for second in recent:
        for rows, some in second.decoded.items():
            decoded.setdefault(rows, Decoded()).add(some)
    taken, tokens = sum(some.seconds for some in decoded.values()), sum(some.emitted for some in decoded.values())
    if not tokens:
        return None
    others = seconds_of_choices(policy.clock, policy.drafters, decoded)
    return {
        "ms_per_token": 1e3 * taken / tokens,
        "others": {name: 1e3 * seconds / tokens for name, seconds in others.items()},
        "regret_to_off": regret(taken, [others[OFF]]),
        "regret_to_best": regret(taken, others.values()),
    }
