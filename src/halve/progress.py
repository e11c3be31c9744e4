"""Progress of long work: bars with the time left, on stderr, and only when stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import TYPE_CHECKING, TypeVar

from halve.escapes import plain

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
Advance = Callable[[float], None]

_open: list[Progress] = []  # the display on screen, if any: nested work adds its bar to it


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Advance]:
    """Show one bar while the block runs; the block calls the yielded function with the amount done since the last call.

    `total` is in the same unit (None: unknown, no time left is shown). Bars nest. Nothing is written when stderr is
    not a terminal, so logs and pipes stay clean, nor by the workers of a pool, whose bars would overwrite each other.
    """
    if not sys.stderr.isatty() or parent_process() is not None:
        yield lambda amount: None
        return
    display = _open[0] if _open else _start()
    task = display.add_task(plain(description), total=total)
    try:
        yield lambda amount: display.advance(task, amount)
    finally:
        display.remove_task(task)
        if not display.tasks:
            display.stop()
            _open.clear()


def track(iterable: Iterable[Item], total: float | None = None, description: str = "") -> Iterator[Item]:
    """Yield the items of `iterable`, showing how many of `total` (default: its length, if it has one) are done."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(description, total) as advance:
        for item in iterable:
            yield item
            advance(1)


def _start() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    display.start()
    _open.append(display)
    return display
