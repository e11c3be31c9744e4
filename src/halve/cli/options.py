"""Options that commands share, each declared once; what tasks and protocols there are comes from their dicts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from halve.errors import HalveError
from halve.measure.quality.protocols import PROTOCOLS
from halve.measure.quality.protocols.continuation import TEMPLATES
from halve.measure.quality.tasks import QUESTION_TASKS, TASKS
from halve.studies.system1.protocol import SYSTEM1


def listed(names: Iterable[str], word: str = "or") -> str:
    """a, b or c"""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def _with_default(names: Iterable[str]) -> list[str]:
    first, *others = names
    return [f"{first} (default)", *others]


# the study's own protocol asks questions as well
_FOR_QUESTIONS = listed([*_with_default(PROTOCOLS), SYSTEM1.name])
_FOR_OTHERS = [
    f"{listed(_with_default(task.protocols))} for {name}" for name, task in TASKS.items() if name not in QUESTION_TASKS
]


# the model, where it goes, where it runs
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, halve checkpoint, or hub id (owner/name).")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it holds a model or an earlier study, and nothing else.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bf16 or fp32: the type of computation (default: the model's own; fp32 for an fp16 model on the CPU).",
        show_default=False,
    ),
]
Json = Annotated[Path | None, typer.Option(help="Write one record to this file.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

# calibration
Calibration = Annotated[
    str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens a window (at most the model's context).")]

# evaluation
Task = Annotated[str, typer.Option(help=f"{listed(TASKS)}.")]
Protocol = Annotated[
    str | None,
    typer.Option(help="; ".join([f"{_FOR_QUESTIONS} for questions", *_FOR_OTHERS]) + ".", show_default=False),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=f"{listed(_with_default(TEMPLATES))}: the prompt of "
        f"{listed([name for name, protocol in PROTOCOLS.items() if protocol.prompt is None], 'and')}.",
        show_default=False,
    ),
]

# sampling
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability; 1 is off.")]


def dtype_of(name: str | None, *others: str):
    """The torch dtype of --dtype, bf16, fp32 or one of `others`; None where there is none."""
    from halve.checkpoint.reader import DTYPES

    known = ("bf16", "fp32", *others)
    if name is not None and name not in known:
        raise HalveError(f"--dtype {name!r} is not known: use {listed(known)}")
    return None if name is None else DTYPES[name]
