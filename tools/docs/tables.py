"""Tables of README.md and docs/*.md from the records, so that no figure in them is typed.

A table stands between two comments, of which the first says how it is made; paths are relative to the project:

    <!-- table compare records="benchmarks/results/first-*.json" columns="model,decode_ms_median" -->
    <!-- end table -->

`compare` is the table of `halve compare`, a row for each model; columns (optional) picks some by their CSV names.
`figures` has one row for each record; columns="KEY: TITLE; ..." names the record's keys, with dots into nested ones;
each="KEY" (optional): one row for each entry of that list instead.
`reproduction` is a table of `halve reproduce`, columns="models" or "fractions".
Several patterns are separated by spaces; files keep the order of the patterns, then of their names.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halve.errors import DataError
from halve.escapes import markdown
from halve.measure.records import Record, read_record
from halve.measure.table import MISSING, circumstances, compare, markdown_table
from halve.measure.units import show_bytes, show_percent, show_share
from halve.studies.system1.tables import fraction_table, model_table


def make_table(request: str, root: Path) -> str:
    """The Markdown of one request, such as `compare records="benchmarks/results/*.json"`."""
    kind, *words = shlex.split(request)
    options = {key: value for key, _, value in (word.partition("=") for word in words)}
    if kind not in KINDS or "records" not in options or not options.keys() <= {"records", "columns", "each"}:
        raise DataError(f'"{request}" is no table: write {" or ".join(KINDS)}, records="PATTERN" and columns="..."')
    records = find_records(options["records"], root)
    if "each" in options:
        records = [record | entry for record in records for entry in look_up(record, options["each"]) or []]
        if not records:
            raise DataError(f"no record has a list {options['each']}: correct the key")
    return KINDS[kind](records, options.get("columns"))


def find_records(patterns: str, root: Path) -> list[Record]:
    """The records whose paths below `root` match; DataError when one of the patterns matches nothing."""
    paths: dict[Path, None] = {}
    for pattern in patterns.split():
        found = sorted(root.glob(pattern))
        if not found:
            raise DataError(f"no file matches {pattern}: run its benchmark or correct the pattern")
        paths |= dict.fromkeys(found)
    return [read_record(path) for path in paths]


def compare_table(records: list[Record], columns: str | None) -> str:
    """Models as rows, with what `halve compare` notes about them below."""
    comparison = compare(records)
    if columns is not None:
        comparison = comparison.only([key.strip() for key in columns.split(",")])
    return comparison.markdown()


def figures_table(records: list[Record], columns: str | None) -> str:
    """Records as rows; DataError when no record has one of the keys."""
    pairs = [part.partition(":") for part in (columns or "").split(";") if part.strip()]
    if not pairs:
        raise DataError('figures needs columns="KEY: TITLE; ..."')
    rows = []
    keys = [key.strip() for key, _, _ in pairs]
    for key in keys:
        if all(look_up(record, key) is None for record in records):
            raise DataError(f"no record has a figure {key}: correct the key")
    for record in records:
        rows.append([show(key, look_up(record, key)) for key in keys])
    titles = [title.strip() or key.strip() for key, _, title in pairs]
    return markdown_table(titles, rows, circumstances(records))


def reproduction_table(records: list[Record], columns: str | None) -> str:
    """One of the two tables of a reproduction: columns="models" or columns="fractions"."""
    kinds = {"models": model_table, "fractions": fraction_table}
    if columns not in kinds or len(records) != 1 or records[0]["kind"] != "reproduction":
        raise DataError(f"reproduction needs one record of halve reproduce and columns={' or '.join(kinds)}")
    table = kinds[columns](records[0])
    return table.markdown()


KINDS: dict[str, Callable[[list[Record], str | None], str]] = {
    "compare": compare_table,
    "figures": figures_table,
    "reproduction": reproduction_table,
}


def look_up(record: Record, key: str) -> Any:
    """The value at a dotted key (numbers count in lists), None where there is none."""
    value: Any = record
    for part in key.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def show(key: str, value: Any) -> str:
    """A value as table text: bytes with their unit, shares and accuracies in per cent, other numbers to 4 digits."""
    if value is None:
        return MISSING
    if key == "model":
        return markdown(Path(value).name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return markdown(value)
    if key.endswith("accuracy"):
        return show_percent(value)
    if key.endswith("_bytes"):
        return show_bytes(value)
    if key.endswith("_share"):
        return show_share(value)
    return f"{value:,}" if isinstance(value, int) or (abs(value) >= 1000 and value.is_integer()) else f"{value:.4g}"
