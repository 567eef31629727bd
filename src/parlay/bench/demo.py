"""`parlay demo`: a real server, real requests, and what betting on guesses did to them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import httpx
from rich.console import Console
from rich.table import Table

from parlay.bench import environment, report
from parlay.bench.client import Target, authorisation
from parlay.bench.load import Load, Reply, send
from parlay.bench.local_server import ServerFailed, local_server
from parlay.bench.report import Spread, progress, table
from parlay.bench.workloads import Prompt, load_prompts
from parlay.types import Speculation

NAME = "auto"
# Without prefix caching every request pays for its prompt, whichever of the two is sent first.
# Compiling beside a measurement would spoil it.
SERVER_OPTIONS = ("--no-prefix-caching", "--compile", "wait", "--log-level", "warning")
ARMS: tuple[Speculation, Speculation] = ("off", "auto")
NAMES: dict[Speculation, str] = {"off": "off", "auto": NAME}
CLEARLY = 0.05  # a run this short cannot tell smaller differences, nor those on which its rounds disagree


@dataclass(frozen=True, slots=True)
class Level:
    """A load: so many requests at a time, and so many in all for each arm in each round."""

    concurrency: int
    requests: int


ROUNDS = 3
PATIENCE = 150  # seconds after which a slow machine is spared the rounds after the first
LEVELS = (Level(1, 3), Level(4, 8), Level(16, 24))  # slots are filled again, as servers fill them


@dataclass(frozen=True, slots=True)
class Cell:
    """What one level and arm delivered, measured by the client."""

    concurrency: int
    speculation: Speculation
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    ttft_p50: float
    tokens_per_step: float
    bets: dict[str, float]  # share of the steps by whose guesses they had


@dataclass(frozen=True, slots=True)
class Comparison:
    """Guesses against off, at one level or in one category."""

    name: str
    off: float  # tokens per second
    auto: float
    tokens_per_step: float
    rounds: tuple[float, ...] = ()  # the ratio in each round, at a level

    @property
    def ratio(self) -> float:
        return self.auto / self.off

    @property
    def paid(self) -> bool:
        """Guesses were faster, in every round."""
        return self.ratio > 1 + CLEARLY and min(self.rounds, default=1) > 1

    @property
    def cost(self) -> bool:
        """Guesses were slower, in every round."""
        return self.ratio < 1 - CLEARLY and max(self.rounds, default=1) < 1


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything the demo found out."""

    model: str
    max_tokens: int
    cells: tuple[Cell, ...]
    levels: tuple[Comparison, ...]
    categories: tuple[Comparison, ...]  # at one request at a time
    texts_compared: int
    texts_equal: int
    reading: str


def run(model: str = "smollm2-135m", json_to: str | None = None, max_tokens: int = 96) -> None:
    """Starts a server, sends it the same requests with and without guesses, and prints the comparison.

    Args:
        model: What to serve.
        json_to: Also write the numbers to this file; `-` is standard output, and the tables then go to standard error.
        max_tokens: Output limit of a request.

    Raises:
        ServerFailed: when the server does not start, or fails a request.
    """
    captured = environment.capture()
    console = report.console(stderr=json_to == "-")
    key = secrets.token_hex(8)
    with (
        Console(stderr=True).status(
            f"starting a server with {model}; the first start compiles and measures for about a minute"
        ) as status,
        local_server(("--model", model, *SERVER_OPTIONS, "--api-key", key)) as url,
    ):
        status.stop()
        loads = measure(Target(url, model, api_key=key), load_prompts(), LEVELS, max_tokens)
    result = summarise(environment.portable(model), max_tokens, loads)
    for part in _tables(result):
        console.print(part)
    console.print(result.reading, highlight=False)
    if json_to is not None:
        environment.deliver(json_to, captured, result)


def measure(target: Target, prompts: Sequence[Prompt], levels: Sequence[Level], max_tokens: int) -> list[Load]:
    """Sends each level's requests once without and once with guesses, round by round, the arms taking turns.

    Raises:
        ServerFailed: when a request fails.
    """
    loads: list[Load] = []
    supplies = [cycle(prompts) for _ in levels]
    requests = len(ARMS) * sum(level.requests for level in levels)
    began = time.monotonic()
    _warm_up(target, prompts)
    for number in range(ROUNDS):
        if number and time.monotonic() - began > PATIENCE:
            break
        arms = ARMS if number % 2 == 0 else ARMS[::-1]
        with progress(f"round {number + 1} of at most {ROUNDS}", requests) as advance:
            for level, supply in zip(levels, supplies, strict=True):
                chosen = list(islice(supply, level.requests))
                for arm in arms:
                    _forget(target)
                    loads.append(send(target, chosen, arm, max_tokens, level.concurrency, advance))
    return loads


def _forget(target: Target) -> None:
    """Makes drafters forget earlier answers: prompts come again, and what was answered once is easily guessed."""
    answer = httpx.post(
        f"{target.url}/admin/forget", headers=authorisation(target.api_key), timeout=60, trust_env=False
    )
    if not answer.is_success:
        raise ServerFailed(f"the server cannot forget earlier answers: {answer.text}")


def _warm_up(target: Target, prompts: Sequence[Prompt]) -> None:
    for speculation in ARMS:
        send(target, prompts[:4], speculation, max_tokens=8, concurrency=4)


def summarise(model: str, max_tokens: int, loads: Sequence[Load]) -> DemoResult:
    """Turns replies into the comparison."""
    concurrencies = list(dict.fromkeys(load.concurrency for load in loads))
    cells = tuple(
        _cell([load for load in loads if (load.concurrency, load.speculation) == (concurrency, speculation)])
        for concurrency in concurrencies
        for speculation in ARMS
    )
    levels = tuple(
        Comparison(
            str(off.concurrency),
            off.tokens_per_second,
            auto.tokens_per_second,
            auto.tokens_per_step,
            _rounds(loads, off.concurrency),
        )
        for off, auto in zip(cells[::2], cells[1::2], strict=True)
    )
    pairs = [pair for concurrency in concurrencies for pair in _pairs(loads, concurrency)]
    equal = sum(off.text == auto.text for off, auto in pairs)
    return DemoResult(
        model=model,
        max_tokens=max_tokens,
        cells=cells,
        levels=levels,
        categories=tuple(_categories(_pairs(loads, concurrencies[0]))),
        texts_compared=len(pairs),
        texts_equal=equal,
        reading=f"{_speed(levels)} {_equality(equal, len(pairs))}",
    )


def _rounds(loads: Sequence[Load], concurrency: int) -> tuple[float, ...]:
    """By how much guesses were faster, round by round."""
    off, auto = (
        [_speed_of(load) for load in loads if (load.concurrency, load.speculation) == (concurrency, arm)]
        for arm in ARMS
    )
    return tuple(fast / slow for slow, fast in zip(off, auto, strict=True))


def _speed_of(load: Load) -> float:
    return sum(reply.tokens for reply in load.replies) / load.seconds


def _cell(loads: Sequence[Load]) -> Cell:
    replies = [reply for load in loads for reply in load.replies]
    tokens, seconds = sum(reply.tokens for reply in replies), sum(load.seconds for load in loads)
    return Cell(
        concurrency=loads[0].concurrency,
        speculation=loads[0].speculation,
        requests=len(replies),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        ttft_p50=Spread.of(reply.ttft for reply in replies).median,
        tokens_per_step=_tokens_per_step(replies),
        bets=_bets(replies),
    )


def _bets(replies: Sequence[Reply]) -> dict[str, float]:
    steps = max(1, sum(reply.steps for reply in replies))
    methods = sorted({method for reply in replies for method in reply.methods})
    return {method: sum(reply.methods.get(method, 0) for reply in replies) / steps for method in methods}


def _pairs(loads: Sequence[Load], concurrency: int) -> list[tuple[Reply, Reply]]:
    """Replies to the same prompt without and with guesses."""
    off, auto = (
        [
            reply
            for load in loads
            if (load.concurrency, load.speculation) == (concurrency, arm)
            for reply in load.replies
        ]
        for arm in ARMS
    )
    return list(zip(off, auto, strict=True))


def _categories(pairs: Sequence[tuple[Reply, Reply]]) -> Iterator[Comparison]:
    """One request at a time: a category's speed is its tokens over its requests' own time."""
    for category in dict.fromkeys(off.category for off, _ in pairs):
        off, auto = zip(*(pair for pair in pairs if pair[0].category == category), strict=True)
        yield Comparison(category, _alone(off), _alone(auto), _tokens_per_step(auto))


def _alone(replies: Iterable[Reply]) -> float:
    replies = list(replies)
    return sum(reply.tokens for reply in replies) / sum(reply.seconds for reply in replies)


def _tokens_per_step(replies: Iterable[Reply]) -> float:
    replies = list(replies)
    return sum(reply.tokens for reply in replies) / max(1, sum(reply.steps for reply in replies))


def _speed(levels: Sequence[Comparison]) -> str:
    """What the ratios say, good or bad."""
    ratios = ", ".join(f"{level.ratio:.2f}x at {level.name}" for level in levels)
    paid = [level.name for level in levels if level.paid]
    cost = [level.name for level in levels if level.cost]
    if paid and cost:
        verdict = f"it paid at {_listed(paid)} and cost speed at {_listed(cost)}"
    elif cost:
        verdict = f"it cost speed at {_listed(cost)} and paid nowhere"
    elif paid:
        verdict = f"it paid at {_listed(paid)} and cost speed nowhere"
    else:
        verdict = "no clear difference"
    return f"Deciding by itself, Parlay gives these tokens/s against off: {ratios} requests at a time: {verdict}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _equality(equal: int, compared: int) -> str:
    if equal == compared:
        return f"All {compared} greedy texts were the same with and without it."
    return (
        f"{equal} of {compared} greedy texts were the same with and without it; the others part where two tokens "
        "nearly tie, since low-precision sums round differently in other batch shapes (--parity strict prevents it)."
    )


def _ratio(level: Comparison) -> str:
    """With the least and the most of its rounds."""
    return f"{level.ratio:.2f}x ({min(level.rounds):.2f}-{max(level.rounds):.2f})"


def _tables(result: DemoResult) -> Iterator[Table]:
    level_of = {level.name: level for level in result.levels}
    columns = (
        "requests at a time",
        "speculation",
        "tokens/s",
        "ratio (by round)",
        "TTFT p50",
        "tokens per step",
        "steps with",
    )
    rows = (
        (
            cell.concurrency,
            NAMES[cell.speculation],
            f"{cell.tokens_per_second:.1f}",
            _ratio(level_of[str(cell.concurrency)]) if cell.speculation != "off" else "",
            f"{1000 * cell.ttft_p50:.0f} ms",
            f"{cell.tokens_per_step:.2f}",
            ", ".join(f"{method} {share:.0%}" for method, share in cell.bets.items()),
        )
        for cell in result.cells
    )
    yield table(f"{result.model}: {NAME} against off, measured by the client", columns, rows, texts=2)
    columns = ("1 request at a time", "off tokens/s", f"{NAME} tokens/s", "ratio", "tokens per step")
    yield table(
        "by kind of task",
        columns,
        (
            (c.name, f"{c.off:.1f}", f"{c.auto:.1f}", f"{c.ratio:.2f}x", f"{c.tokens_per_step:.2f}")
            for c in result.categories
        ),
    )
