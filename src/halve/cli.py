"""The command line: parse, call one function, print. Defaults live with the functions or here, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import halve
from halve.errors import HalveError

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

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, halve checkpoint, or hub id (owner/name).")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bf16 or fp32: the type of computation (default: the model's own).", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds something.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _dtype(name: str | None):
    from halve.checkpoint import DTYPES

    if name is not None and name not in ("bf16", "fp32"):
        raise HalveError(f"--dtype {name!r} is not known: use bf16 or fp32")
    return None if name is None else DTYPES[name]


def _command() -> str:
    return "halve " + shlex.join(sys.argv[1:])


@app.command()
def compress(
    model: Model,
    out: Out,
    step: Annotated[
        list[str] | None,
        typer.Option(help="NAME:key=value,... One step; repeat for several, they run in order.", show_default=False),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The same steps as a YAML list.", show_default=False)] = None,
    calibration: Annotated[
        str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens a window (at most the model's context).")] = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop before any weight is read.")
    ] = False,
) -> None:
    """Quantize or prune MODEL by a recipe of steps and write the result to OUT.

    For example `--step rtn:bits=8` (int8 weight-only); `halve steps` lists all steps and their options. Every linear is
    listed as done or skipped with its reason. An interrupted run is continued by the same command.
    """
    from halve import show
    from halve.compression import Request, plan_recipe
    from halve.compression import compress as run
    from halve.recipe import as_steps, read_recipe

    if step and recipe:
        raise HalveError("--step and --recipe were both given: use one of them")
    steps = read_recipe(recipe) if recipe else as_steps(step or [])
    options = {"calibration": calibration, "samples": samples, "window": window, "seed": seed, "device": device}
    if dry_run:
        plan = plan_recipe(Request(model, out, steps, dtype=_dtype(dtype), **options))
        show.plan(plan, steps)
        return
    result = run(
        model, out, steps, dtype=_dtype(dtype), overwrite=overwrite, on_plan=lambda p: show.plan(p, steps), **options
    )
    show.result(result)


@app.command()
def convert(model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Turn a folder of pickled .bin weights into safetensors (most OPT checkpoints need it)."""
    from halve.conversion import convert as run

    print(f"wrote {run(model, out, overwrite=overwrite)}")


@app.command()
def steps() -> None:
    """List the steps a recipe may have, with their options and defaults."""
    from halve import show
    from halve.methods import METHODS

    show.steps(METHODS)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(halve.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the input or the request is wrong, 1 anything else."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except HalveError as error:
        _fail(str(error))
    except UsageError as error:
        context = getattr(error, "ctx", None)
        message = getattr(error, "format_message", error.__str__)()
        _fail(message + (f" (see `{context.command_path} --help`)" if context else ""))
    except (typer.Abort, KeyboardInterrupt):
        print("halve: interrupted", file=sys.stderr)
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print("halve: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
