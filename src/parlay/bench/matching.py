"""`parlay measure --ppd`: how often the next token is among an exit layer's candidates, in text that runs freely.

Predictive pipelined decoding (Yang et al., arXiv 2307.05908) calls it p_correct. The text is what the model itself
writes greedily, since that is what is decoded; matches on given text would say something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from parlay.bench import environment, units
from parlay.bench.offline import drive
from parlay.bench.report import console, progress, table
from parlay.bench.workloads import encode, load_prompts
from parlay.bets import Bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.drafters.exit_part import ExitPart
from parlay.drafters.pipelined import exit_of
from parlay.engine.batch import Draft
from parlay.engine.engine import Engine
from parlay.engine.model import LoadedModel, TargetModel
from parlay.types import Offer, Row, RowResult, SamplingParams

RESAMPLES = 1000
Ranks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Exit:
    """Where candidates are read off: after so many layers, raw or by a trained part, as the user wrote it."""

    layer: int
    source: str
    part: ExitPart | None


@dataclass(frozen=True, slots=True)
class Match:
    """What so many candidates from one exit are worth.

    Attributes:
        exit_layer: e.
        source: As `--drafter ppd=SOURCE` takes it.
        trained: Whether it has a trained part.
        candidates: k.
        p_correct: How often the next token is among them,
        low: at least,
        high: and at most, in 95 of 100 cases, by drawing prompts again and again.
        autocorrelation: Of a token's match with the next one's.
    """

    exit_layer: int
    source: str
    trained: bool
    candidates: int
    p_correct: float
    low: float
    high: float
    autocorrelation: float


@dataclass(frozen=True, slots=True)
class Matches:
    """All that `parlay measure --ppd` finds, as `parlay plan --ppd` reads it: rates, and what the units take."""

    model: str
    tokens: int
    matches: tuple[Match, ...]
    times: units.Times | None


class Watching(Drafter):
    """Bets nothing, and notes the rank of every next token at each exit.

    Attributes:
        ranks: By row, and by exit in their order: one rank a token, from 0.
    """

    name = "ppd"

    def __init__(self, exits: Sequence[Exit], most: int) -> None:
        self._exits, self._most = exits, most
        self.taps = tuple(sorted({exit.layer for exit in exits}))
        self.ranks: dict[int, list[list[int]]] = {}

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        self._target = target

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """See `Drafter`."""
        return [None] * len(rows)

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        """See `Drafter`."""
        return [None] * len(rows)

    @torch.inference_mode()
    def commit(self, rows: Sequence[Row], results: Sequence[RowResult], taps: Mapping[int, torch.Tensor]) -> None:
        """See `Drafter`. Looks at rows that decode."""
        ends = np.cumsum([row.count for row in rows]) - 1
        some = [(row, got, int(end)) for row, got, end in zip(rows, results, ends, strict=True) if got.emitted]
        some = [(row, got, end) for row, got, end in some if row.count == 1]
        if not some:
            return
        device = self._target.device
        lines = torch.tensor([end for _, _, end in some], device=device)
        tokens = torch.tensor([got.emitted[0] for _, got, _ in some], device=device)
        for place, exit in enumerate(self._exits):
            logits = self._target.head(taps[exit.layer][lines], exit.part).logits
            own = logits.gather(1, tokens[:, None])
            for (row, _, _), rank in zip(some, (logits > own).sum(1).tolist(), strict=True):
                self.ranks.setdefault(row.seq, [[] for _ in self._exits])[place].append(min(rank, self._most))


def run(
    config: EngineConfig,
    *,
    dataset: Path | None,
    limit: int | None,
    exits: Sequence[str],
    candidates: Sequence[int],
    max_tokens: int,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measures match rates and what the units take.

    Raises:
        ValueError: naming the option that is wrong.
    """
    captured = environment.capture()
    found: list[Watching] = []

    def watching(loaded: LoadedModel) -> Drafters:
        found.append(Watching([_exit(source, loaded) for source in exits or _all(loaded)], max(candidates)))
        return Drafters(found)

    engine = Engine(replace(config, speculation=None, prefix_caching=False), drafters=watching)
    prompts = encode(load_prompts(dataset, limit), engine.tokenizer)
    with progress("decoding", len(prompts)) as advance:
        drive(engine, prompts, SamplingParams(temperature=0, max_tokens=max_tokens), concurrency, advance)
    if engine.drafters.failed:
        raise ValueError("exit: reading candidates off failed; the log says why")
    texts = [[np.array(ranks) for ranks in row] for row in found[0].ranks.values()]
    if not texts:
        raise ValueError("max-tokens: no token was ever decoded; raise it")
    matches = tuple(
        match_of(exit, count, [text[place] for text in texts])
        for place, exit in enumerate(found[0]._exits)
        for count in candidates
    )
    engine.drafters = Drafters([])  # what watched is no part of a step
    times = units.measure(engine, candidates) if units.available(engine.model) else None
    result = Matches(config.model, sum(len(text[0]) for text in texts), matches, times)
    if out is not None:
        environment.write_json(out, captured, result)
    if as_json:
        environment.deliver("-", captured, result)
    else:
        show(result, out)


def counts(written: str) -> tuple[int, ...]:
    """Numbers of candidates, as the user wrote them.

    Raises:
        ValueError: where they are none.
    """
    try:
        found = tuple(sorted({int(part) for part in written.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < 1 or found[-1] > 64:
        raise ValueError(f"candidates {written!r}: write numbers from 1 to 64, as 1,2,3")
    return found


def _exit(source: str, loaded: LoadedModel) -> Exit:
    layer, part = exit_of(source, loaded)
    return Exit(layer, source, part)


def _all(loaded: LoadedModel) -> list[str]:
    """Every layer of the upper half."""
    count = len(loaded.shapes)
    return [str(layer) for layer in range(-(-count // 2), count)]


def match_of(exit: Exit, candidates: int, texts: Sequence[Ranks]) -> Match:
    """Rates of one exit and number of candidates. texts: per prompt, each next token's rank, in order."""
    hits = [(ranks < candidates).astype(float) for ranks in texts]
    sums = np.array([(some.sum(), len(some)) for some in hits])
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES) @ sums
    share = float(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    pairs = [(some[:-1] - share, some[1:] - share) for some in hits if len(some) > 1]
    products, count = sum(float(a @ b) for a, b in pairs), sum(len(a) for a, _ in pairs)
    variance = share * (1 - share)
    follows = products / count / variance if count and variance else math.nan
    return Match(
        exit.layer, exit.source, exit.part is not None, candidates, share, float(low), float(high), float(follows)
    )


def show(result: Matches, out: Path | None) -> None:
    """Prints the rates as a table, and what to do with them."""
    counts = sorted({match.candidates for match in result.matches})
    rows = {}
    for match in result.matches:
        name = f"{match.exit_layer}, trained" if match.trained else f"{match.exit_layer}"
        cell = f"{match.p_correct:.3f} ({match.low:.3f}-{match.high:.3f}) {match.autocorrelation:+.2f}"
        rows.setdefault(name, []).append(cell)
    title = f"{result.model}: next token among k candidates (95% sure), autocorrelation; {result.tokens} tokens"
    console().print(table(title, ("exit layer", *(f"k = {k}" for k in counts)), [(n, *c) for n, c in rows.items()]))
    if result.times is None:
        console().print("One core: there is no other unit to begin the next token on, so nothing was timed.")
    elif out is not None:
        console().print(f"parlay plan --ppd {out}", highlight=False)
