"""What commands print, in one place: text out of files and arguments does nothing to the terminal."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

from halve.escapes import lines, plain
from halve.ranks.job import started_ranks


def say(text: str) -> None:
    """One line on stdout."""
    print(plain(text), flush=True)


def complain(text: str) -> None:
    """One line on stderr, beginning with the program's name."""
    who = f"halve: rank {os.environ.get('RANK')}" if started_ranks() > 1 else "halve"
    print(plain(f"{who}: {' '.join(text.split())}"), file=sys.stderr, flush=True)


def stream(text: str) -> None:
    """Text of a model as it comes, to a file or a pipe as it is."""
    print(lines(text) if sys.stdout.isatty() else text, end="", flush=True)


def to_any_terminal() -> None:
    """Characters that the terminal's encoding does not have are written as their codes instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def console() -> Console:
    """Where tables are printed: square brackets and :names: in them are text."""
    return Console(markup=False, emoji=False, highlight=False)
