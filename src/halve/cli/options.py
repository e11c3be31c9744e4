"""Options that several commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halve.errors import HalveError

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
Json = Annotated[Path | None, typer.Option(help="Write one record to this file.", show_default=False)]
Calibration = Annotated[
    str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def dtype_of(name: str | None):
    """The torch dtype of --dtype, None for the model's own."""
    from halve.checkpoint.reader import DTYPES

    if name is not None and name not in ("bf16", "fp32"):
        raise HalveError(f"--dtype {name!r} is not known: use bf16 or fp32")
    return None if name is None else DTYPES[name]
