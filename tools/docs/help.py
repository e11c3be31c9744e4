"""What the command line says about itself: every `--help`, and the steps of a recipe with their options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer

from halve.cli.app import app
from halve.compression.methods import METHODS
from halve.errors import DataError
from halve.model.refused import REFUSED

WIDTH = 110


def make_help(request: str, root: Path) -> str:
    """The text of `halve --help` and of `halve COMMAND --help` for every command, without frames and colour."""
    if request:
        raise DataError(f'"{request}" is too much: help takes no options')
    commands: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = [f"- [halve {name}](#halve-{name}): {c.get_short_help_str(WIDTH)}" for name, c in commands.items()]
    sections = [f"## halve {name}\n\n```text\n{_help(name, command)}\n```\n" for name, command in commands.items()]
    return "\n".join(["".join(f"{line}\n" for line in lines), *sections])


def _help(name: str, command: Any) -> str:
    # frames of the terminal say nothing more, and their width depends on it
    markup, command.rich_markup_mode = command.rich_markup_mode, None
    try:
        context = command.make_context(f"halve {name}", [], resilient_parsing=True, terminal_width=WIDTH)
        text = command.get_help(context)
    finally:
        command.rich_markup_mode = markup
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def make_steps(request: str, root: Path) -> str:
    """The table of all steps: options with their defaults, and what each step does."""
    if request:
        raise DataError(f'"{request}" is too much: steps takes no options')
    rows = ["| step | options and defaults | what it does |\n", "| --- | --- | --- |\n"]
    for name, method in METHODS.items():
        options = " ".join(f"`{field.name}={_default(field.default)}`" for field in dataclasses.fields(method))
        what = " ".join((method.__doc__ or "").split()).replace("|", r"\|")
        rows.append(f"| `{name}` | {options} | {what} |\n")
    return "".join(rows)


def make_refused(request: str, root: Path) -> str:
    """The table of model types that are known and not served, and why."""
    if request:
        raise DataError(f'"{request}" is too much: refused takes no options')
    rows = [f"| {', '.join(f'`{name}`' for name in types)} | {why} |\n" for why, types in REFUSED.items()]
    return "".join(["| refused | because of |\n", "| --- | --- |\n", *rows])


def _default(value: object) -> str:
    return r"\|".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
