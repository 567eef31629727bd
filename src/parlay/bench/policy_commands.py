"""`parlay plan` and `parlay simulate`: what to bet, worked out without a model."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

from pathlib import Path
from typing import Annotated, Literal

import typer

PROFILE = "h100-llama-8b"

_profile = typer.Option(help="What steps cost: a file, or a built-in name.", rich_help_panel="Costs and odds")
_acceptance = typer.Option(
    help="How often guesses are accepted: a file by kind of request and method, or probabilities of a node's first "
    "children, as 0.7 or 0.7,0.1,0.05.",
    metavar="FILE|P,..",
    rich_help_panel="Costs and odds",
)
_simulated_profile = typer.Option(
    help=f"What steps cost: a file, or a built-in name; by default that of the recording, or {PROFILE}.",
    rich_help_panel="Costs and odds",
)
_simulated_acceptance = typer.Option(
    help="As for parlay plan; by default that of the recording, or 0.7.",
    metavar="FILE|P,..",
    rich_help_panel="Costs and odds",
)
_method = typer.Option(
    help="Whose guesses written probabilities are; by default the profile's first drafter.",
    rich_help_panel="Costs and odds",
)
_json = typer.Option(
    "--json",
    help="Also write the numbers to this file; - is standard output.",
    metavar="FILE",
    rich_help_panel="Report",
)
_plot = typer.Option(help="Also draw them: .svg, .png or .pdf.", metavar="FILE", rich_help_panel="Report")


def plan(
    profile: Annotated[str, _profile] = PROFILE,
    acceptance: Annotated[str, _acceptance] = "0.7",
    method: Annotated[str | None, _method] = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes, separated by commas.", metavar="N,..", rich_help_panel="Bets")
    ] = "1,2,4,8,16,32,64,128,256",
    context: Annotated[int, typer.Option(help="Tokens of a row's context.", rich_help_panel="Bets", min=0)] = 512,
    size: Annotated[int, typer.Option(help="Most guesses of a row.", rich_help_panel="Bets", min=1, max=512)] = 64,
    depth: Annotated[int, typer.Option(help="Most levels of guesses.", rich_help_panel="Bets", min=1, max=64)] = 12,
    chains: Annotated[bool, typer.Option("--chains", help="Chains only, no trees.", rich_help_panel="Bets")] = False,
    sampled: Annotated[
        bool,
        typer.Option(
            "--sampled",
            help="Rows sample their tokens, so that guesses are drawn and chosen among; for calibrated profiles.",
            rich_help_panel="Costs and odds",
        ),
    ] = False,
    export: Annotated[
        Literal["vllm", "trtllm"] | None,
        typer.Option(
            help="Print, and nothing else, the best chain length of every batch size up to the largest of --batch, as "
            "vLLM's num_speculative_tokens_per_batch_size or TensorRT-LLM's (1.3) draft_len_schedule.",
            rich_help_panel="Report",
        ),
    ] = None,
    ppd: Annotated[
        Path | None,
        typer.Option(
            help="Instead, what predictive pipelined decoding takes by exit layer and number of candidates, from the "
            "file that parlay measure --ppd writes.",
            metavar="FILE",
            rich_help_panel="Costs and odds",
        ),
    ] = None,
    json_to: Annotated[str | None, _json] = None,
    plot: Annotated[Path | None, _plot] = None,
) -> None:
    """Find the best method, depth and tree by batch size, and the batch size from which no bet pays."""
    if ppd is not None:
        from parlay.bench.planning_ppd import run as run_ppd

        run_ppd(ppd, json_to)
        return
    from parlay.bench.planning import run

    run(
        profile=profile,
        acceptance=acceptance,
        method=method,
        batches=batch,
        context=context,
        size=size,
        depth=depth,
        chains=chains,
        sampled=sampled,
        export=export,
        json_to=json_to,
        plot=plot,
    )


def simulate(
    profile: Annotated[str | None, _simulated_profile] = None,
    acceptance: Annotated[str | None, _simulated_acceptance] = None,
    method: Annotated[str | None, _method] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Policies to compare: off, fixed:LENGTH, synergy, smartspec, goodput, oracle (which knows what the "
            "others must learn).",
            metavar="NAME,..",
            rich_help_panel="Bets",
        ),
    ] = "off,fixed:3,synergy,smartspec,goodput,oracle",
    size: Annotated[
        int, typer.Option(help="Guesses of the tree that a drafter offers.", rich_help_panel="Bets", min=1, max=512)
    ] = 16,
    depth: Annotated[
        int,
        typer.Option(help="Its levels; a chain of so many is on offer, too.", rich_help_panel="Bets", min=1, max=16),
    ] = 8,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Requests per second and replica, several separated by commas; by default 2.",
            metavar="R,..",
            rich_help_panel="Load",
        ),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="Instead of a rate: seconds and rates of phases, as 40x1,40x16,40x48.",
            metavar="SxR,..",
            rich_help_panel="Load",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a rate: a recording of parlay serve --record, or a CSV of arrivals with TIMESTAMP, "
            "ContextTokens and GeneratedTokens.",
            metavar="FILE",
            rich_help_panel="Load",
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens of prompt and output, as 256,256, or a CSV of that form to draw them from.",
            metavar="IN,OUT|FILE",
            rich_help_panel="Load",
        ),
    ] = "256,256",
    cv: Annotated[
        float,
        typer.Option(
            help="Standard deviation of the gaps between requests over their mean: 1 is a Poisson process, more comes "
            "in bursts.",
            rich_help_panel="Load",
            min=0.05,
            max=20,
        ),
    ] = 1.0,
    requests: Annotated[int, typer.Option(help="Requests at each rate.", rich_help_panel="Load", min=1)] = 1000,
    seeds: Annotated[int, typer.Option(help="Loads drawn at each rate.", rich_help_panel="Load", min=1)] = 3,
    replicas: Annotated[int, typer.Option(help="Servers behind a router.", rich_help_panel="Servers", min=1)] = 1,
    router: Annotated[
        Literal["round_robin", "least_loaded"],
        typer.Option(help="Whom a request is given to.", rich_help_panel="Servers"),
    ] = "least_loaded",
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="Rows that a server runs at a time, by default 256.", rich_help_panel="Servers", min=1),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts in one step, by default 2048.", rich_help_panel="Servers", min=1),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that fit into a server's KV cache, by default 400000.", rich_help_panel="Servers", min=1
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(help="Spread of the time of steps, as a share of it.", rich_help_panel="Servers", min=0, max=1),
    ] = 0.0,
    reuse: Annotated[
        int,
        typer.Option(
            help="Steps for which a plan is kept while the number of rows stays about the same; 1 plans every step, as "
            "servers do, and takes longest.",
            rich_help_panel="Servers",
            min=1,
        ),
    ] = 4,
    json_to: Annotated[str | None, _json] = None,
    plot: Annotated[Path | None, _plot] = None,
) -> None:
    """Compare policies under load without a model: latency, goodput, and how far they bet over time.

    A recording brings the server's own costs, limits and outcomes along, unless they are given.
    """
    from parlay.bench.simulating import Settings, run

    run(
        Settings(
            profile=profile,
            acceptance=acceptance,
            method=method,
            policies=tuple(name.strip() for name in policies.split(",")),
            size=size,
            depth=depth,
            rates=rate,
            phases=phases,
            trace=trace,
            lengths=lengths,
            cv=cv,
            requests=requests,
            seeds=seeds,
            replicas=replicas,
            router=router,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_tokens=kv_tokens,
            noise=noise,
            reuse=reuse,
        ),
        json_to=json_to,
        plot=plot,
    )
