"""Prints the reference of the `parlay` command as Markdown: `scripts/cli_docs.py > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer import Context
from typer.main import get_command

from parlay.cli import app


def render() -> str:
    """The whole reference, from the same objects that parse the command line."""
    program = get_command(app)
    context = Context(program, info_name="parlay")
    lines = ["# The parlay command", "", "<!-- Generated: python scripts/cli_docs.py > docs/cli.md -->", ""]
    lines += [program.help or "", "", *_options(program, context)]
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        lines += ["", *_command(command, Context(command, info_name=name, parent=context))]
    return "\n".join(lines) + "\n"


def _command(command: Any, context: Any) -> Iterator[str]:
    yield f"## {context.command_path}"
    yield ""
    yield command.help
    yield ""
    yield f"`{' '.join([context.command_path, *command.collect_usage_pieces(context)])}`"
    yield ""
    yield from _options(command, context)


def _options(command: Any, context: Any) -> list[str]:
    """One table per panel, in the order in which the help shows them."""
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and "--help" not in parameter.opts:
            panel = parameter.rich_help_panel or "General"
            panels.setdefault(panel, []).append("| `{}` | {} |".format(*map(_cell, record)))
    tables = [[f"| {panel} | |", "|---|---|", *rows] for panel, rows in panels.items()]
    return [line for table in tables for line in ["", *table]][1:]


def _cell(text: str) -> str:
    return text.strip().removeprefix("/ ").replace("|", "\\|").replace("  [", " [")


if __name__ == "__main__":
    print(render(), end="")
