"""The command that trains. torch is imported inside, so that help is instant."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from parlay.options import DEFAULT_MODEL, parse_bytes


def train(
    out: Annotated[Path, typer.Argument(help="Folder to write the drafter to; an order that was broken off goes on.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Whom to guess for: a built-in name, a Hugging Face id, a local folder."),
    ] = DEFAULT_MODEL,
    kind: Annotated[
        Literal["eagle", "medusa", "self", "draft_model"], typer.Option(help="The kind of drafter: a method's name.")
    ] = "eagle",
    start: Annotated[
        str | None,
        typer.Option(help="A drafter of this kind to go on from: a folder or a Hugging Face id.", metavar="SOURCE"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to answer, as for parlay bench; by default the model writes the users' turns as well.",
            metavar="FILE",
            rich_help_panel="Data",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of recorded conversations, for drafters that read those layers or fewer; by default in OUT.",
            rich_help_panel="Data",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to record.", min=1000, rich_help_panel="Data")] = 400_000,
    disk: Annotated[
        int,
        typer.Option(
            help="Most disk that they may take, as 8GiB.", parser=parse_bytes, metavar="SIZE", rich_help_panel="Data"
        ),
    ] = "8GiB",  # type: ignore[assignment]  # goes through the parser, and reads better in the help
    minutes: Annotated[
        float,
        typer.Option(help="Time for everything; half of it for data at most.", min=0.1, rich_help_panel="Training"),
    ] = 90,
    epochs: Annotated[int, typer.Option(help="Times over the data.", min=1, rich_help_panel="Training")] = 6,
    batch: Annotated[int, typer.Option(help="Tokens in a step.", min=64, rich_help_panel="Training")] = 1024,
    rate: Annotated[float, typer.Option(help="Highest learning rate.", min=1e-6, rich_help_panel="Training")] = 2e-3,
    turns: Annotated[
        int,
        typer.Option(
            help="How far a head goes on from its own output while it learns.", min=1, max=8, rich_help_panel="Training"
        ),
    ] = 4,
    heads: Annotated[
        int, typer.Option(help="Medusa heads, each for one more guess.", min=1, max=16, rich_help_panel="Size")
    ] = 4,
    divergence: Annotated[
        Literal["forward_kl", "reverse_kl", "tvd"],
        typer.Option(help="Distance from the model's distribution that goes down.", rich_help_panel="Training"),
    ] = "forward_kl",
    on_policy: Annotated[
        float,
        typer.Option(
            help="Share of steps in which a draft model learns from texts that it writes itself.",
            min=0,
            max=1,
            rich_help_panel="Training",
        ),
    ] = 0.0,
    exit: Annotated[
        int | None,
        typer.Option(help="Layers that self runs; by default a quarter.", min=1, rich_help_panel="Size"),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers of a draft model; by default an eighth.", min=1, rich_help_panel="Size"),
    ] = None,
    vocab: Annotated[int, typer.Option(help="Tokens that a head can guess.", min=16, rich_help_panel="Size")] = 8192,
    intermediate: Annotated[
        int | None,
        typer.Option(help="Width of the MLP of eagle and self; by default the model's.", min=8, rich_help_panel="Size"),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            help="Layers that a head reads, as 2,15,27; by default a low, a middle and a high one.",
            rich_help_panel="Size",
        ),
    ] = None,
    float16: Annotated[
        bool,
        typer.Option(
            "--float16",
            help="Write weights in float16 instead of int8 (a draft model: bfloat16).",
            rich_help_panel="Size",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Decides what is random in training, and what is asked.", rich_help_panel="Training")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Training")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Train a drafter for a model, on text that the model writes itself."""
    from parlay.bench.workloads import load_prompts
    from parlay.train.order import Order
    from parlay.train.run import train

    card = train(
        Order(
            kind=kind,
            model=model,
            out=out,
            start=start,
            data=data or out / "training" / "data",
            prompts=tuple(prompt.text for prompt in load_prompts(prompts)) if prompts else (),
            tokens=tokens,
            disk=disk,
            minutes=minutes,
            epochs=epochs,
            batch=batch,
            rate=rate,
            turns=turns,
            heads=heads,
            divergence=divergence,
            on_policy=on_policy,
            exit=exit,
            layers=layers,
            vocab=vocab,
            intermediate=intermediate,
            taps=_layers(taps),
            int8=not float16,
            seed=seed,
            device=device,
        )
    )
    typer.echo(json.dumps(asdict(card), indent=1) if as_json else card.markdown)


def _layers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"--taps {text!r}: write numbers of layers, as 2,15,27") from None
