"""The command line: its commands stand in models.py, measure.py and studies.py; each parses, calls one function, prints."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import torch
import typer

from halve._version import __version__
from halve.cli import measure, models, studies
from halve.cli.output import complain, to_any_terminal
from halve.errors import HalveError
from halve.escapes import lines
from halve.measure.machine import ask_for_huge_pages

app = typer.Typer(
    name="halve",
    help="Make a large language model smaller and faster without retraining it, and know what that cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer brings its own copy of click in some versions; this is the base of its usage errors in all of them
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


# in the order in which the help lists them
for command in (
    models.compress,
    measure.evaluate,
    measure.benchmark,
    models.generate,
    measure.compare,
    studies.demo,
    studies.layers,
    studies.search,
    studies.reproduce,
    studies.report,
    studies.card,
    models.fetch,
    models.convert,
    models.export,
    models.steps,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the input, the request or the machine cannot do, 1 anything else.

    What is raised otherwise is a fault of halve: it is shown whole, with a word on what to do about it.
    """
    ask_for_huge_pages()
    to_any_terminal()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="halve", standalone_mode=False)
    except HalveError as error:
        _fail(str(error))
    except UsageError as error:
        context = getattr(error, "ctx", None)
        message = getattr(error, "format_message", error.__str__)()
        _fail(message + (f" (see `{context.command_path} --help`)" if context else ""))
    except (typer.Abort, KeyboardInterrupt):
        complain("interrupted")
        sys.exit(1)
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, its permissions and the space left")
    except Exception as error:
        cpu = isinstance(error, RuntimeError) and "not enough memory" in str(
            error
        )  # torch's allocator has no class of it
        if cpu or isinstance(error, MemoryError | torch.OutOfMemoryError):
            _fail(f"out of memory ({error}): use a smaller model, batch or window, or a machine with more")
        print(lines(traceback.format_exc()), end="", file=sys.stderr)
        complain("this is a fault of halve itself: please report it with the text above")
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    complain(message)
    sys.exit(2)
