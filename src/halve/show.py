"""Plans and results as people read them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from halve.compression import RecipePlan, Result
    from halve.methods import Method
    from halve.plan import StepPlan


def size(count: float) -> str:
    """Bytes in decimal units: 6.43 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def plan(recipe: RecipePlan, steps: list[Method]) -> None:
    """What every step will do, one line per kind of linear, and the sizes before and after."""
    console = Console()
    for number, (method, step) in enumerate(zip(steps, recipe.steps, strict=True), 1):
        console.print(_step_table(f"step {number}: {method.name}", step))
    ratio = recipe.bytes_after / recipe.bytes_before
    console.print(
        f"weights: {size(recipe.bytes_before)} -> {size(recipe.bytes_after)} ({ratio:.0%}); "
        f"disk while working: {size(recipe.disk_bytes)}"
    )


def _step_table(title: str, step: StepPlan) -> Table:
    """Linears that fare alike share a line."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in step.rows:
        what = f"{row.action}: {row.reason}" if row.reason else row.action
        total = kinds.setdefault((row.name.split(".")[-1], what), [0, 0, 0])
        for i, value in enumerate((1, row.bytes_before, row.bytes_after)):
            total[i] += value
    table = Table(title=title, title_justify="left")
    table.add_column("linear", no_wrap=True)
    table.add_column("layers", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    for (name, what), (count, before, after) in kinds.items():
        table.add_row(name, str(count), what, size(before), size(after))
    return table


def steps(methods: dict[str, type]) -> None:
    """Every step with its description, options and defaults."""
    console = Console()
    for name, method in methods.items():
        options = ",".join(f"{f.name}={_text(f.default)}" for f in dataclasses.fields(method))
        console.print(f"[bold]{name}[/bold]:{escape(options)}", soft_wrap=True, highlight=False)
        console.print(f"    {escape(' '.join((method.__doc__ or '').split()))}\n", highlight=False)


def _text(default: object) -> str:
    return "|".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()


def result(done: Result) -> None:
    """Where the result is, and what is worth knowing about it."""
    console = Console()
    for note in done.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {done.out}", soft_wrap=True)
