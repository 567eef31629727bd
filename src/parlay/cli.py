"""The `parlay` command. torch is imported inside the commands that need it, so that help is instant."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from parlay import __version__
from parlay.bench.commands import bench, demo, measure, profile
from parlay.bench.policy_commands import plan, simulate
from parlay.config import Calibrate, Compile, EngineConfig
from parlay.options import DEFAULT_MODEL, engine_config, parse_bytes, sampling_params, takes
from parlay.train.commands import train
from parlay.types import RequestOutput, SamplingParams
from parlay.verify.commands import verify

BAD_INPUT = 2


class _Commands(TyperGroup):
    """Says what was wrong with the input in one line, whoever found out."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except typer.Abort:
            code = 1
        except (typer.TyperException, ValueError, OSError) as error:
            logging.getLogger("parlay").debug("where it happened", exc_info=True)
            message = _one_line(error)
            if message:  # a call without arguments shows the help and says nothing
                typer.secho(f"error: {message}", fg="red", err=True)
            code = BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:  # without the number that str() would put first
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def parlay(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Serve large language models fast: guess tokens where it pays, and never change what the model says."""
    if version:
        typer.echo(f"parlay {__version__}")
        raise typer.Exit


@app.command()
@takes(engine_config)
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel="Server")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", rich_help_panel="Server", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that clients use, by default --model; may be repeated, and answers have the first.",
            rich_help_panel="Server",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Refuse requests without this bearer token.", rich_help_panel="Server", envvar="PARLAY_API_KEY"
        ),
    ] = None,
    max_queue_size: Annotated[
        int,
        typer.Option(
            help="Sequences that may wait beside those that run; calls beyond that get 429.",
            rich_help_panel="Server",
            min=0,
        ),
    ] = 1024,
    max_body_size: Annotated[
        int,
        typer.Option(
            help="Longest body of a request, as 8MiB or bytes; longer ones get 413.",
            rich_help_panel="Server",
            parser=parse_bytes,
            metavar="SIZE",
        ),
    ] = "8MiB",  # type: ignore[assignment]  # goes through the parser, and reads better in the help
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log every HTTP request.", rich_help_panel="Server")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write arrivals, lengths and outcomes, but no text, to this file, which parlay simulate --trace "
            "replays under any policy.",
            metavar="FILE",
            rich_help_panel="Server",
        ),
    ] = None,
    compile: Annotated[
        Compile,
        typer.Option(
            help="Compile the model's layers, which takes a minute once for a machine: while serving, before it, not "
            "unless that was done before, or never.",
            rich_help_panel="Server",
        ),
    ] = "background",
    calibrate: Annotated[
        Calibrate,
        typer.Option(
            help="Measure what steps cost, once for a machine, a model and its drafters: quick (about 20 s), full "
            "(60 s) or skip, which learns it on the way. Only where the policy asks.",
            rich_help_panel="Speculation",
        ),
    ] = "quick",
) -> None:
    """Serve a model to OpenAI clients over HTTP."""
    from parlay.server.app import serve as run_server

    config = dataclasses.replace(config, compile=compile, calibrate=calibrate)
    run_server(
        config,
        host=host,
        port=port,
        served_model_names=served_model_name or (),
        api_key=api_key,
        max_queue_size=max_queue_size,
        max_body_bytes=max_body_size,
        access_log=access_log,
        record=record,
    )


@app.command()
@takes(engine_config, sampling_params)
def generate(
    config: EngineConfig,
    params: SamplingParams,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Read prompts from a file, one a line: text, a JSON string, an object with prompt or messages, or a "
            "list of messages. - is standard input, which is also read when no prompt is given.",
        ),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts through the model's chat template.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Answer prompts, all at once, and say how fast it went."""
    questions = [*(prompts or ()), *_read_prompts(file, required=not prompts)]
    asked: list[Any] = [(_as_messages if chat else _as_text)(question) for question in questions]
    from parlay import LLM

    llm = LLM(config)
    started = time.perf_counter()
    outputs = llm.chat(asked, params) if chat else llm.generate(asked, params)
    seconds = time.perf_counter() - started
    for output in outputs:
        _print_output(output, as_json)
    typer.secho(_summary(outputs, seconds), dim=True, err=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A built-in model.")] = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"path": FOLDER} instead of the folder.')] = False,
) -> None:
    """Fetch a built-in model into the cache and print its folder."""
    from parlay.engine.checkpoint import pull as pull_model

    folder = str(pull_model(name))
    typer.echo(json.dumps({"path": folder}) if as_json else folder)


for command in (plan, simulate, train, measure, demo, bench, profile, verify):
    app.command()(command)


def _read_prompts(file: Path | None, required: bool) -> list[Any]:
    """Prompts from a file or standard input, one a line; empty lines count for nothing."""
    if file is None and (not required or sys.stdin.isatty()):
        lines: list[str] = []
    elif file is None or str(file) == "-":
        lines = sys.stdin.read().splitlines()
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
    questions = [_parse_line(line) for line in lines if line.strip()]
    if required and not questions:
        raise typer.BadParameter("give a prompt, or --file, or prompts on standard input")
    return questions


def _parse_line(line: str) -> Any:
    """What a line says, when it is JSON of a form that a prompt can have; the line itself otherwise."""
    if line.lstrip()[0] not in '"{[':
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return line
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    messages = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    if not (isinstance(value, str) or (messages and value)):
        raise typer.BadParameter(f"a JSON prompt is a string, or has prompt or messages: {line[:80]}")
    return value


def _as_messages(question: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


def _as_text(question: Any) -> str:
    if not isinstance(question, str):
        raise typer.BadParameter("messages need the chat template: leave --no-chat out")
    return question


def _print_output(output: RequestOutput, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        return
    for choice in output.outputs:
        typer.echo(choice.text)


def _summary(outputs: Iterable[RequestOutput], seconds: float) -> str:
    choices = [choice for output in outputs for choice in output.outputs]
    tokens = sum(len(choice.token_ids) for choice in choices)
    steps = sum(choice.stats.steps for choice in choices)
    return f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s, {tokens / max(steps, 1):.2f} per step"
