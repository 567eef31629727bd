"""`parlay bench`: load on a server, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.table import Table

from parlay.bench import environment, report
from parlay.bench.arrivals import parse_rate, schedule
from parlay.bench.client import Endpoint, Target, Wish, authorisation
from parlay.bench.datasets import Dataset, Synthetic, draw, parse_dataset
from parlay.bench.objectives import parse_objectives
from parlay.bench.report import progress, table
from parlay.bench.serving import Planned, send
from parlay.bench.summary import Distribution, RequestResult, Summary, request_results, summarise

MAX_TOKENS = 128
FAILED = 1  # exit code when no request was answered
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, with all defaults filled in; holds no key.

    Attributes:
        url: The server, without a path.
        model: Its name there.
        endpoint: Chat messages or plain completions.
        dataset: A file's name, `synthetic:N words`, or `parlay` for its own prompts.
        distinct_prompts: How many of the prompts differ.
        rate: Poisson arrivals per second; None sends all at once.
        concurrency: Most requests in flight; None is no limit.
        num_prompts: How many requests.
        seed: Of arrivals and prompts.
        max_tokens: Output limit.
        temperature: 0 is greedy.
        ignore_eos: Go on to the limit.
        speculation: Asked for per request; None leaves it out.
        objectives: Seconds by metric, for the goodput.
        timeout: Seconds that a request may take.
    """

    url: str
    model: str
    endpoint: Endpoint
    dataset: str
    distinct_prompts: int
    rate: float | None
    concurrency: int | None
    num_prompts: int
    seed: int
    max_tokens: int
    temperature: float
    ignore_eos: bool
    speculation: str | None
    objectives: Mapping[str, float]
    timeout: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that a run found out."""

    settings: Settings
    summary: Summary
    requests: tuple[RequestResult, ...]


def run(
    *,
    url: str,
    model: str | None,
    endpoint: Endpoint,
    api_key: str | None,
    dataset: str | None,
    rate: str,
    concurrency: int | None,
    num_prompts: int,
    seed: int,
    max_tokens: int | None,
    temperature: float,
    ignore_eos: bool,
    speculation: str | None,
    slo: str | None,
    timeout: float,
    json_to: str | None,
) -> int:
    """Sends the load, prints the tables, and writes the numbers where they are wanted.

    Args:
        url: The server's address.
        model: None asks the server.
        endpoint: Which API.
        api_key: For servers that want one.
        dataset: As `parse_dataset` reads it; None takes Parlay's own prompts.
        rate: Requests per second, or `inf`.
        concurrency: Most requests in flight; None sets no limit.
        num_prompts: How many requests.
        seed: Of arrivals and prompts.
        max_tokens: Output limit; None takes that of a synthetic dataset, or 128.
        temperature: 0 is greedy.
        ignore_eos: Go on to the limit.
        speculation: Parlay's extension; None leaves it out.
        slo: Objectives for the goodput.
        timeout: Seconds that a request may take.
        json_to: A file, or `-` for standard output; the tables then go to standard error.

    Returns:
        The exit code: 0, 1 when no request was answered, 130 after Ctrl-C.

    Raises:
        ValueError: for settings or a dataset that cannot be read.
        OSError: when a file cannot be read or written, or the server cannot be asked for its model.
    """
    chosen = parse_dataset(dataset)
    per_second = parse_rate(rate)
    objectives = parse_objectives(slo) if slo else {}
    limit = _limit(max_tokens, chosen)
    prompts = draw(chosen, num_prompts, seed)
    url = base_url(url)
    target = Target(url, model or ask_model(url, api_key), endpoint, api_key)
    settings = Settings(
        url=url,
        model=environment.portable(target.model),
        endpoint=endpoint,
        dataset=_name(chosen),
        distinct_prompts=len({(prompt.text, str(prompt.history)) for prompt in prompts}),
        rate=per_second,
        concurrency=concurrency,
        num_prompts=num_prompts,
        seed=seed,
        max_tokens=limit,
        temperature=temperature,
        ignore_eos=ignore_eos,
        speculation=speculation,
        objectives=objectives,
        timeout=timeout,
    )
    if json_to is not None and json_to != "-":
        _prepare(Path(json_to))
    captured = environment.capture()
    wish = Wish(limit, temperature, ignore_eos, speculation)
    plan = [Planned(*pair) for pair in zip(prompts, schedule(per_second, num_prompts, seed), strict=True)]
    with progress("requests", num_prompts) as advance:
        traffic = send(target, wish, plan, concurrency, advance, timeout)
    results = tuple(request_results(traffic))
    summary = summarise(results, traffic.unfinished, per_second is not None, objectives)
    console = report.console(stderr=json_to == "-")
    for part in tables(settings, summary):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    if json_to is not None:
        environment.deliver(json_to, captured, BenchResult(settings, summary, results))
    if traffic.unfinished:
        return INTERRUPTED
    return 0 if summary.completed else FAILED


def base_url(text: str) -> str:
    """The address without the `/v1` that some write behind it.

    Raises:
        ValueError: when it is no HTTP address, or names a user.
    """
    url = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url {text!r}: write the server's address, as http://127.0.0.1:8000")
    if parsed.userinfo:
        raise ValueError("url: leave user and password out; a key goes to --api-key")
    return url


def ask_model(url: str, api_key: str | None) -> str:
    """The first model that the server lists.

    Raises:
        OSError: when it lists none, or cannot be asked.
    """
    address = f"{url}/v1/models"
    try:
        answer = httpx.get(address, headers=authorisation(api_key), timeout=30, trust_env=False)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.TransportError as error:
        raise OSError(f"{address}: {error or type(error).__name__}; is the server running?") from None
    except httpx.HTTPStatusError as error:
        raise OSError(f"{address}: HTTP {error.response.status_code}; name the model with --model") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise OSError(f"{address}: lists no model; name one with --model") from None


def _limit(max_tokens: int | None, dataset: Dataset) -> int:
    given = dataset.output if isinstance(dataset, Synthetic) else None
    if max_tokens is not None and given is not None:
        raise ValueError("max-tokens: synthetic:INPUT,OUTPUT says it already; give one")
    return max_tokens or given or MAX_TOKENS


def _prepare(file: Path) -> None:
    """Finds out whether the file can be written while nothing is lost if it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise OSError(f"json {str(file)!r}: {error.strerror}; name a file that can be written") from None


def _name(dataset: Dataset) -> str:
    if isinstance(dataset, Synthetic):
        return f"synthetic:{dataset.words} words"
    return environment.portable(str(dataset)) if dataset else "parlay"


def tables(settings: Settings, summary: Summary) -> Iterator[Table | str]:
    """The result for a reader: what was delivered, how long it took, what failed."""
    arrivals = "all at once" if settings.rate is None else f"{settings.rate:g} requests/s"
    limit = "" if settings.concurrency is None else f", at most {settings.concurrency} at a time"
    title = f"{settings.model}: {settings.num_prompts} requests of {settings.dataset}, {arrivals}{limit}"
    yield title  # of its own, since tables break theirs at their own width
    yield table("measured by the client", ("", ""), _totals(settings, summary))
    metrics = {
        "time to first token (TTFT)": summary.ttft,
        "time per output token (TPOT)": summary.tpot,
        "between pieces of text (ITL)": summary.itl,
        "end to end (E2E)": summary.e2e,
        "schedule lag": summary.lag,
    }
    rows = [(name, *_milliseconds(found)) for name, found in metrics.items() if found is not None]
    if rows:
        yield table("latency, ms", ("", "mean", "p50", "p90", "p99"), rows)
    if summary.errors:
        columns = ("failed requests", "what the first said", "count")
        yield table("errors", columns, ((e.kind, e.example, e.count) for e in summary.errors), texts=2)


def _totals(settings: Settings, summary: Summary) -> Iterator[tuple[str, str]]:
    yield "requests completed", f"{summary.completed}"
    yield "requests failed", f"{summary.failed}"
    if summary.unfinished:
        yield "requests unfinished when interrupted", f"{summary.unfinished}"
    if settings.distinct_prompts < settings.num_prompts:
        yield "different prompts (the others repeat, which a prefix cache notices)", f"{settings.distinct_prompts}"
    yield "duration", f"{summary.seconds:.2f} s"
    yield "peak requests in flight", f"{summary.peak_concurrency}"
    yield "requests/s", f"{summary.requests_per_second:.2f}"
    if summary.goodput is not None:
        limits = ", ".join(f"{metric} {1000 * limit:g} ms" for metric, limit in settings.objectives.items())
        yield f"requests/s within {limits}", f"{summary.goodput:.2f}"
    if summary.input_tokens_per_second is not None:
        yield f"input tokens/s ({summary.input_tokens} in all)", f"{summary.input_tokens_per_second:.1f}"
    counted = f"{summary.output_tokens} in all, by {summary.counted}"
    yield f"output tokens/s ({counted})", f"{summary.output_tokens_per_second:.1f}"
    if (bets := summary.speculation) is not None:
        if bets.tokens_per_step is not None:
            yield "tokens per step", f"{bets.tokens_per_step:.2f}"
        if bets.acceptance is not None:
            yield f"guesses accepted, of {bets.stats.drafted}", f"{bets.acceptance:.1%}"


def _milliseconds(found: Distribution) -> tuple[str, ...]:
    return tuple(f"{1000 * value:.1f}" for value in (found.mean, found.p50, found.p90, found.p99))
