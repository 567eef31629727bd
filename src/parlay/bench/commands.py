"""The commands that measure. torch is imported inside those that need it, so that help is instant."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from parlay.config import Compile, EngineConfig
from parlay.options import DEFAULT_MODEL, engine_config, takes


def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="What to serve.")] = DEFAULT_MODEL,
    json_to: Annotated[
        str | None,
        typer.Option("--json", help="Also write the numbers to this file; - is standard output.", metavar="FILE"),
    ] = None,
) -> None:
    """See speculation at work: a real server, real requests, with and without guesses, in a few minutes."""
    from parlay.bench.demo import run

    run(model, json_to)


def bench(
    url: Annotated[str, typer.Option(help="The server.", rich_help_panel="Server")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Its model; by default the first it lists.", rich_help_panel="Server"),
    ] = None,
    endpoint: Annotated[
        Literal["chat", "completions"],
        typer.Option(help="Prompts as messages of a chat, or as plain text.", rich_help_panel="Server"),
    ] = "chat",
    api_key: Annotated[
        str | None,
        typer.Option(help="Bearer token to show.", rich_help_panel="Server", envvar="PARLAY_API_KEY"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Prompts: JSON lines or a list, with prompt, messages, Spec-Bench's turns or ShareGPT's "
            "conversations; or synthetic:INPUT,OUTPUT for so many random words and tokens. By default Parlay's own "
            "prompts.",
            metavar="FILE",
            rich_help_panel="Load",
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(help="Requests; a set with fewer prompts starts over.", rich_help_panel="Load", min=1)
    ] = 64,
    rate: Annotated[
        str,
        typer.Option(help="Requests per second, at random times; inf sends all at once.", rich_help_panel="Load"),
    ] = "inf",
    concurrency: Annotated[
        int | None,
        typer.Option(help="Most requests in flight; by default no limit.", rich_help_panel="Load", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes arrivals and prompts.", rich_help_panel="Load")] = 0,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request counts as failed.", rich_help_panel="Load", min=0.001)
    ] = 600,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Output limit of a request; by default that of synthetic:INPUT,OUTPUT, or 128.",
            rich_help_panel="Requests",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token each time.", rich_help_panel="Requests", min=0)
    ] = 0.0,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Go on to the limit, on servers that know this.", rich_help_panel="Requests"),
    ] = False,
    speculation: Annotated[
        str | None,
        typer.Option(
            help="How to bet: off, auto, max or a bet such as eagle:3; only Parlay knows this.",
            metavar="WISH",
            rich_help_panel="Requests",
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Also count the requests within these limits, as ttft:500ms,tpot:50ms,e2e:5s.",
            metavar="LIMITS",
            rich_help_panel="Report",
        ),
    ] = None,
    json_to: Annotated[
        str | None,
        typer.Option(
            "--json",
            help="Also write settings, summary and every request to this file; - is standard output.",
            metavar="FILE",
            rich_help_panel="Report",
        ),
    ] = None,
) -> None:
    """Measure any OpenAI-compatible server under load: latency, throughput, failures."""
    from parlay.bench.online import run

    code = run(
        url=url,
        model=model,
        endpoint=endpoint,
        api_key=api_key,
        dataset=dataset,
        rate=rate,
        concurrency=concurrency,
        num_prompts=num_prompts,
        seed=seed,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        speculation=speculation,
        slo=slo,
        timeout=timeout,
        json_to=json_to,
    )
    raise typer.Exit(code)


@takes(engine_config)
def measure(
    config: EngineConfig,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Prompts, as for parlay bench; by default Parlay's own.", rich_help_panel="Load"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use this many prompts, the categories taking turns.", min=1, rich_help_panel="Load"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token each time.", min=0, rich_help_panel="Load")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Output limit per prompt.", min=2, rich_help_panel="Load")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1, rich_help_panel="Load")] = 8,
    ppd: Annotated[
        bool,
        typer.Option(
            "--ppd",
            help="Instead, how often the next token is among the candidates of early exits, and what two units take.",
            rich_help_panel="Exits",
        ),
    ] = False,
    exit: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers before an exit, or the folder of a trained one; may be repeated. By default all of the upper "
            "half.",
            metavar="LAYER|FOLDER",
            rich_help_panel="Exits",
        ),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Numbers of candidates, separated by commas.", metavar="K,..", rich_help_panel="Exits")
    ] = "1,2,3,5",
    compile: Annotated[
        Compile, typer.Option(help="Compile the model's layers before --ppd, or never.", rich_help_panel="Exits")
    ] = "wait",
    width: Annotated[int, typer.Option(help="Children of a node.", min=1, max=64, rich_help_panel="Tree")] = 4,
    depth: Annotated[int, typer.Option(help="Levels of guesses.", min=1, max=16, rich_help_panel="Tree")] = 4,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask a live server for what its drafts came to instead, by level; no model is loaded.",
            rich_help_panel="Live",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Whose drafts; by default the first it tells of.", rich_help_panel="Live")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer token to show.", rich_help_panel="Live", envvar="PARLAY_API_KEY")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the file that parlay plan reads.", rich_help_panel="Report")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.", rich_help_panel="Report")] = False,
) -> None:
    """Measure how often a drafter's guesses are accepted, by level and child."""
    if ppd:
        from parlay.bench import matching

        matching.run(
            dataclasses.replace(config, compile=compile),
            dataset=dataset,
            limit=limit,
            exits=exit or (),
            candidates=matching.counts(candidates),
            max_tokens=max_tokens,
            concurrency=concurrency,
            out=out,
            as_json=as_json,
        )
        return
    from parlay.bench import measuring

    if url is not None:
        measuring.scrape(url, method, api_key, out, as_json)
        return
    measuring.run(
        config,
        dataset=dataset,
        limit=limit,
        temperature=temperature,
        width=width,
        depth=depth,
        max_tokens=max_tokens,
        concurrency=concurrency,
        out=out,
        as_json=as_json,
    )


@takes(engine_config)
def profile(
    config: EngineConfig,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            help="Requests at a time, may be repeated; by default 1, 4, 16.", rich_help_panel="Profile", min=1
        ),
    ] = None,
    choice: Annotated[
        Literal["greedy", "sampled", "both"], typer.Option(help="How tokens are chosen.", rich_help_panel="Profile")
    ] = "both",
    dataset: Annotated[
        Path | None,
        typer.Option(help="Prompts, as for bench; by default Parlay's own.", metavar="FILE", rich_help_panel="Profile"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per request.", rich_help_panel="Profile", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Times each case is run.", rich_help_panel="Profile", min=1)] = 3,
    compile: Annotated[
        Compile,
        typer.Option(help="Compile the model's layers first, or never.", rich_help_panel="Profile"),
    ] = "wait",
    json_to: Annotated[
        str | None,
        typer.Option(
            "--json",
            help="Also write the numbers to this file; - is standard output.",
            metavar="FILE",
            rich_help_panel="Profile",
        ),
    ] = None,
) -> None:
    """See where the time of a decoding step goes: scheduling, planning, guessing, verifying and the rest."""
    from parlay.bench.profiling import run

    run(
        dataclasses.replace(config, compile=compile),
        rows=rows or (1, 4, 16),
        choice=choice,
        dataset=dataset,
        max_tokens=max_tokens,
        repeats=repeats,
        json_to=json_to,
    )
