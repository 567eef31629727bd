"""Loads for the simulator: when requests arrive, how long they are, and of which kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parlay.policy.trees import Floats, Ints
from parlay.types import Offer

Hits = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A drafter's guesses as they were recorded: by output token, whether the guess for it would have been accepted.

    What a chain of d guesses gains is then the number of hits in a row from where a request stands, at most d. Unlike
    a probability it keeps hits together as they came.

    Attributes:
        hits: [tokens] of many texts one after the other; a request starts somewhere and goes round.
    """

    hits: Hits

    @property
    def runs(self) -> Ints:
        """[tokens] hits in a row from each token on, going round."""
        count = len(self.hits)
        if self.hits.all():
            return np.full(count, count)
        misses = np.flatnonzero(~self.hits)
        following = np.searchsorted(misses, np.arange(count))
        return np.concatenate([misses, [misses[0] + count]])[following] - np.arange(count)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a drafter whose guesses follow from the text alone showed for a recorded request, token by token.

    Attributes:
        offers: Chains, with how sure it was of each guess; None where it had nothing to go by.
        hits: How many of its guesses came true.
    """

    offers: tuple[Offer | None, ...]
    hits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike in how well they can be guessed.

    Attributes:
        name: What users call it.
        share: How common it is, relative to the other kinds.
        acceptance: By method, [children] or [levels, children] (see `parlay.policy.trees`), or a recording.
    """

    name: str
    share: float
    acceptance: Mapping[str, Floats | Recorded]

    def matrix(self, method: str) -> Floats:
        """[levels, children]; of a recording, how often its guesses hit after so many hits in a row."""
        found = self.acceptance.get(method, np.zeros(1))
        if isinstance(found, Recorded):
            runs = found.runs
            reached = np.array([(runs >= level).sum() for level in range(18)], dtype=np.float64)
            return (reached[1:] / np.maximum(reached[:-1], 1))[:, None]
        return np.atleast_2d(np.asarray(found, dtype=np.float64))


def read_kinds(text: str, method: str) -> tuple[Kind, ...]:
    """Kinds of requests from a file, or one kind from probabilities written out.

    A file is JSON: `{"kinds": [{"name": "code", "share": 0.3, "acceptance": {"draft_model": [0.8, 0.1]}}]}`, where an
    acceptance is a vector by child, a matrix by level and child, or a recording such as `{"hits": "110111"}`.

    Args:
        text: Path of such a file, or `0.7` for a first child, or `0.7,0.1` for the first children.
        method: Whose acceptance is meant by written probabilities.

    Raises:
        ValueError: naming the file or the field and what is wrong with it.
    """
    try:
        written = np.array([float(part) for part in text.split(",")])
    except ValueError:
        if not Path(text).is_file():
            raise ValueError(f"acceptance {text!r}: no such file, and no probabilities such as 0.7,0.1") from None
        return _kinds_of(Path(text))
    return (Kind("all", 1.0, {method: _checked(written, "acceptance")}),)


def _kinds_of(path: Path) -> tuple[Kind, ...]:
    try:
        entries = [_kind(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["kinds"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the first is JSON's and Unicode's, too
        said = error if type(error) is ValueError else repr(error)
        raise ValueError(f"{path} is no file of acceptances: {said}") from error
    if not entries or not any(kind.share for kind in entries):
        raise ValueError(f"{path}: kinds must not be empty, and share must be above 0 once")
    return tuple(entries)


def _kind(entry: Mapping[str, Any]) -> Kind:
    name, share = str(entry["name"]), float(entry.get("share", 1.0))
    if not 0 <= share < np.inf:
        raise ValueError(f"{name}.share: must be 0 or more")
    found = {method: _acceptance(value, f"{name}.{method}") for method, value in entry["acceptance"].items()}
    if not found:
        raise ValueError(f"{name}.acceptance: names no method")
    return Kind(name, share, found)


def _acceptance(value: object, where: str) -> Floats | Recorded:
    if isinstance(value, Mapping):
        hits = str(value["hits"])
        if not hits or set(hits) - {"0", "1"}:
            raise ValueError(f"{where}: hits must be a string of 0 and 1")
        return Recorded(np.frombuffer(hits.encode(), dtype=np.uint8) == ord("1"))
    try:
        return _checked(np.asarray(value, dtype=np.float64), where)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: must be probabilities that sum to at most 1, by child or by level and child"
        ) from None


def _checked(matrix: Floats, where: str) -> Floats:
    rows = np.atleast_2d(matrix)
    good = rows.ndim == 2 and rows.size and np.isfinite(rows).all() and (rows >= 0).all()
    if not good or (rows.sum(axis=1) > 1 + 1e-9).any():
        raise ValueError(f"{where}: must be probabilities that sum to at most 1, by child or by level and child")
    return matrix


def mixture(kinds: Sequence[Kind], method: str) -> Floats:
    """[levels, children]: the acceptance of a guess whose request is any of these kinds.

    Deep levels are mostly reached by requests that accept much, so every level weighs the kinds by how often their
    first children lead there.
    """
    parts = [kind.matrix(method) for kind in kinds]
    levels, children = max(map(len, parts)), max(part.shape[1] for part in parts)
    levels = max(levels, 16) if len(kinds) > 1 else levels
    reached = np.array([kind.share for kind in kinds])
    reached = reached / reached.sum()
    found = np.zeros((levels, children))
    for level in range(levels):
        rows = np.zeros((len(parts), children))
        for row, part in zip(rows, parts, strict=True):
            row[: part.shape[1]] = part[min(level, len(part) - 1)]
        found[level] = reached @ rows / max(reached.sum(), 1e-300)
        reached = reached * rows[:, 0]
        if reached.sum() < 1e-12:
            return found[: level + 1]
    return found


# ---- requests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests, in the order of their arrival.

    Attributes:
        arrival: [n] seconds from the start.
        prompt: [n] tokens.
        output: [n] tokens.
        kind: [n] which of the kinds each is.
        shown: By method, [n] what it showed for each, where that was recorded; it is then what it offers.
    """

    arrival: Floats
    prompt: Ints
    output: Ints
    kind: Ints
    shown: Mapping[str, Sequence[Shown]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.arrival) == len(self.prompt) == len(self.output) == len(self.kind):
            raise ValueError("a workload needs a prompt, an output and a kind for every arrival")
        if len(self.arrival) and ((np.diff(self.arrival) < 0).any() or min(self.prompt.min(), self.output.min()) < 1):
            raise ValueError("arrivals must rise, and prompts and outputs have a token or more")

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of constant intensity.

    Attributes:
        seconds: How long it lasts.
        rate: Requests per second.
        shares: How common each kind is during it; by default, what the kinds say themselves.
    """

    seconds: float
    rate: float
    shares: tuple[float, ...] | None = None


def arrivals(phases: Sequence[Phase], cv: float, rng: np.random.Generator) -> Floats:
    """Arrival times of a renewal process whose gaps are Gamma distributed, its clock running as fast as the rate is.

    Args:
        phases: One after the other.
        cv: Standard deviation of a gap over its mean: 1 is a Poisson process, more comes in bursts.
        rng: Chooses the gaps.
    """
    ends = np.cumsum([0.0, *(phase.seconds for phase in phases)])
    expected = np.cumsum([0.0, *(phase.seconds * phase.rate for phase in phases)])
    shape = 1 / cv**2
    reached = -30 * max(1.0, cv**2)  # it has run for long when the first phase begins
    found = []
    while reached < expected[-1]:
        gaps = rng.gamma(shape, 1 / shape, max(16, int(1.1 * (expected[-1] - reached)) + 1))
        found.append(reached + np.cumsum(gaps))
        reached = float(found[-1][-1])
    clock = np.concatenate([np.zeros(0), *found])
    return np.interp(clock[(clock >= 0) & (clock < expected[-1])], expected, ends)


def draw(
    phases: Sequence[Phase],
    lengths: tuple[Ints, Ints],
    kinds: Sequence[Kind],
    seed: int,
    cv: float = 1.0,
) -> Workload:
    """A workload at random; the same for the same seed.

    Args:
        phases: How often requests arrive.
        lengths: Pairs of prompt and output tokens to draw from, [pairs] each.
        kinds: What they may be.
        seed: Of everything that is drawn.
        cv: See `arrivals`.
    """
    rng = np.random.default_rng(seed)
    times = arrivals(phases, cv, rng)
    pairs = rng.integers(len(lengths[0]), size=len(times))
    ends = np.cumsum([phase.seconds for phase in phases])
    phase_of = np.minimum(np.searchsorted(ends, times, side="right"), len(phases) - 1)
    usual = [kind.share for kind in kinds]
    shares = np.array([usual if phase.shares is None else phase.shares for phase in phases], dtype=np.float64)
    bounds = np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)
    kind = (rng.random(len(times))[:, None] >= bounds[phase_of, :-1]).sum(axis=1)
    return Workload(times, lengths[0][pairs], lengths[1][pairs], kind)


def read_trace(path: Path) -> tuple[Floats, tuple[Ints, Ints]]:
    """Arrival seconds, and prompt and output tokens, of a CSV with TIMESTAMP, ContextTokens and GeneratedTokens.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    times, prompts, outputs = [], [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for line in reader:
            try:
                times.append(_seconds(line["TIMESTAMP"]))
                prompts.append(int(line["ContextTokens"]))
                outputs.append(int(line["GeneratedTokens"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: needs TIMESTAMP, ContextTokens and GeneratedTokens ({error})"
                ) from None
    if not times:
        raise ValueError(f"{path}: holds no request")
    order = np.argsort(times, kind="stable")
    arrival = np.array(times)[order] - min(times)
    return arrival, (np.maximum(np.array(prompts)[order], 1), np.maximum(np.array(outputs)[order], 1))


def _seconds(stamp: str) -> float:
    try:
        return float(stamp)
    except ValueError:
        day, _, fraction = stamp.partition(".")
        return datetime.fromisoformat(day + "+00:00").timestamp() + float(f"0.{fraction or 0}")
