"""What a server was asked and what became of it, as a file that `parlay simulate --trace` replays; no text, no tokens.

One JSON object a line: first what the server is, then every choice as it ends, at last what steps cost by then.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parlay.policy.acceptance import LEVELS, RANKS, Trials
from parlay.policy.goodput import Goodput
from parlay.policy.recording import FORMAT
from parlay.types import StepReport

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

logger = logging.getLogger(__name__)


def _matrix() -> list[list[int]]:
    return [[0] * RANKS for _ in range(LEVELS)]


@dataclass(slots=True)
class _Outcomes:
    """Of one method's guesses for one choice, by level and rank."""

    tried: list[list[int]] = field(default_factory=_matrix)
    accepted: list[list[int]] = field(default_factory=_matrix)

    def add(self, trials: Trials) -> None:
        for level, rank in trials.tried:
            self.tried[level][rank] += 1
        for level, rank in trials.accepted:
            self.accepted[level][rank] += 1

    def written(self) -> dict[str, list[list[int]]]:
        """Without what was never tried."""
        levels = max((level for level in range(LEVELS) if any(self.tried[level])), default=-1) + 1
        ranks = max((rank for line in self.tried for rank in range(RANKS) if line[rank]), default=-1) + 1
        return {name: [line[:ranks] for line in getattr(self, name)[:levels]] for name in ("tried", "accepted")}


@dataclass(slots=True)
class _Choice:
    """One that has not ended."""

    cached: int
    first: float | None = None
    output: int = 0
    steps: int = 0
    outcomes: dict[str, _Outcomes] = field(default_factory=dict)


class Recording:
    """Writes a file while an engine serves; a listener of its steps, on its thread.

    Args:
        engine: Whose steps.
        path: A new file, or one that is written over.

    Raises:
        OSError: when the file cannot be written.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine, self._began = engine, time.perf_counter()
        self._file = path.open("w", encoding="utf-8", buffering=1)  # a line is there once it is written
        self._choices: dict[int, _Choice] = {}
        self._most = 2 * engine.config.max_num_seqs  # more than that run only where some were aborted
        config = engine.config
        self._write({
            "parlay_recording": FORMAT,
            "model": config.model,
            "policy": engine.policy_name,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "kv_tokens": engine.scheduler.blocks.num_pages * config.page_size,
        })  # fmt: skip

    def note(self, report: StepReport) -> None:
        """Takes a step."""
        if len(self._choices) > self._most:
            self._drop_aborted()
        for row, got, delta in zip(report.rows, report.result.rows, report.deltas, strict=True):
            choice = self._choices.get(row.seq)
            if choice is None:
                choice = self._choices[row.seq] = _Choice(cached=row.start)
            if got.method is not None and got.tree.parents:
                choice.outcomes.setdefault(got.method, _Outcomes()).add(Trials.of(got.tree, got.accepted))
            if delta.tokens:
                choice.first = choice.first or report.ended
                choice.output += len(delta.tokens)
                choice.steps += 1
            if delta.finish_reason is not None:
                self._end(row.seq, row.request.arrival, len(row.request.prompt), delta.finish_reason, report.ended)

    def close(self) -> None:
        """Writes what steps cost by now."""
        policy = self._engine.policy
        try:
            with self._file:
                if isinstance(policy, Goodput):
                    self._write({"profile": asdict(policy.clock.learnt())})
        except OSError as error:
            logger.warning("the recording has no end (%s)", error.strerror)

    def _drop_aborted(self) -> None:
        """Forgets choices that nobody waits for any more; a recording has none of them."""
        live = {seq.seq for seq in self._engine.scheduler.sequences()}
        self._choices = {seq: choice for seq, choice in self._choices.items() if seq in live}
        self._most = 2 * max(self._engine.config.max_num_seqs, len(self._choices))

    def _end(self, seq: int, arrival: float, prompt: int, reason: str, now: float) -> None:
        choice = self._choices.pop(seq)
        first = now if choice.first is None else choice.first
        self._write({
            "arrival": round(arrival - self._began, 6),
            "first": round(first - self._began, 6),
            "finish": round(now - self._began, 6),
            "prompt": prompt,
            "cached": choice.cached,
            "output": choice.output,
            "steps": choice.steps,
            "end": reason,
            "outcomes": {method: some.written() for method, some in choice.outcomes.items()},
        })  # fmt: skip

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
