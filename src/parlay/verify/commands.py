"""`parlay verify`. torch is imported only where a model is the reference."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

from pathlib import Path
from typing import Annotated

import typer

_server = "Server"
_reference = "Reference"
_tests = "Tests"


def verify(
    url: Annotated[str, typer.Option(help="The server under test.", rich_help_panel=_server)] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Its model; by default the first it lists.", rich_help_panel=_server),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Bearer token to show.", rich_help_panel=_server, envvar="PARLAY_API_KEY"),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1, rich_help_panel=_server)] = 8,
    reference_url: Annotated[
        str | None,
        typer.Option(
            help="A server of the same model that is asked for single tokens, which nobody speculates on; by default "
            "the server under test itself.",
            rich_help_panel=_reference,
        ),
    ] = None,
    reference_api_key: Annotated[
        str | None,
        typer.Option(help="Bearer token to show to it.", rich_help_panel=_reference, envvar="PARLAY_REFERENCE_API_KEY"),
    ] = None,
    reference_model: Annotated[
        str | None,
        typer.Option(
            help="Run this model here instead, by transformers: a built-in name, a Hugging Face id, a local folder.",
            rich_help_panel=_reference,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the reference model; auto is what parlay serve would take.", rich_help_panel=_reference),
    ] = "auto",
    dataset: Annotated[
        Path | None,
        typer.Option(help="Prompts, as for parlay bench; by default Parlay's own.", rich_help_panel=_tests),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many of them.", min=1, rich_help_panel=_tests)] = 8,
    answers: Annotated[int, typer.Option(help="Answers to sample.", min=2, rich_help_panel=_tests)] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=3, rich_help_panel=_tests)] = 32,
    temperature: Annotated[
        float,
        typer.Option(help="Of sampled answers; 1 where a server is the reference.", min=0.01, rich_help_panel=_tests),
    ] = 1.0,
    tie: Annotated[
        float,
        typer.Option(
            help="Nats by which two tokens may differ and still change places in a greedy answer, as low precision "
            "rounds sums differently in batches of different shapes.",
            min=0,
            rich_help_panel=_tests,
        ),
    ] = 0.5,
    alpha: Annotated[
        float,
        typer.Option(
            help="How often a lossless server may fail the test of its samples.",
            min=1e-9,
            max=0.5,
            rich_help_panel=_tests,
        ),
    ] = 1e-3,
    json_to: Annotated[
        str | None,
        typer.Option("--json", help="Also write the results to this file; - is standard output.", metavar="FILE"),
    ] = None,
) -> None:
    """Test any OpenAI-compatible server for losslessness: whether its output is its model's own."""
    from parlay.verify.run import Settings, run

    settings = Settings(
        url, model, concurrency, reference_url, reference_model, dtype, dataset, prompts, answers, max_tokens,
        temperature, tie, alpha,
    )  # fmt: skip
    raise typer.Exit(run(settings, api_key, reference_api_key, json_to))
