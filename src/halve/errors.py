"""The one error tree. Every message names the value, the limit and the remedy, on one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class HalveError(ValueError):
    """The input or the request is wrong; the command line prints the message and exits with 2."""


class CheckpointError(HalveError):
    """A model folder is missing, incomplete, corrupt, or holds values nothing can be computed with."""


class UnsupportedModelError(HalveError):
    """The architecture, or a config field that changes the maths, is not one this decoder computes."""


class RecipeError(HalveError):
    """A step, an option or a combination of them cannot be applied to this model."""


class DataError(HalveError):
    """A text, calibration or question file is missing, malformed or empty."""


class OutputError(HalveError):
    """The result cannot be written where it was asked for."""


class StaleKernelsError(HalveError):
    """The compiled kernels were built from other sources than this package."""


@contextmanager
def reading(path: Path | str, failure: type[HalveError]) -> Iterator[None]:
    """Turn an OSError of reading `path`, or a file below it, into `failure`: which file, the system's reason, a remedy."""
    try:
        yield
    except OSError as error:
        raise failure(unreadable(error, path)) from error


def unreadable(error: OSError, path: Path | str) -> str:
    """What to say of an OSError that came up while `path` was read."""
    name = error.filename if isinstance(error.filename, (str, Path)) else path
    return f"{name}: cannot be read: {error.strerror or error}; check the path and its permissions"


def refuse_pipe(path: Path, failure: type[HalveError]) -> None:
    """Raise `failure` for a pipe or a device: opening or reading it may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise failure(f"{path}: is a pipe or a device, which may never end: put a file there")


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line and cut short: some repeat what the file holds."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:299]}…"


def shown(value: Any) -> str:
    """A value out of a file as a message shows it: on one line, cut short, however long or deep it is."""
    return _SHORT.repr(value)
