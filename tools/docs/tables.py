"""Write the tables of README.md and docs/*.md from the records, so that no figure in them is typed.

    python -m tools.docs.tables            rewrite every table
    python -m tools.docs.tables --check    change nothing; exit with 1 when a table is stale

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

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halve.errors import DataError, HalveError
from halve.measure.records import Record, read_record
from halve.measure.table import MISSING, circumstances, compare, show_bytes, show_share
from halve.studies.system1.tables import fraction_table, model_table

ROOT = Path(__file__).resolve().parents[2]
OPENING = re.compile(r"^<!-- table (?P<request>.*?) -->[ \t]*\n", re.MULTILINE)
CLOSING = "<!-- end table -->"


def render(text: str, root: Path, source: str) -> str:
    """`text` with the inside of every table comment pair made anew; DataError for a malformed request."""
    done, position = [], 0
    while opening := OPENING.search(text, position):
        line = text.count("\n", 0, opening.start()) + 1
        end = text.find(CLOSING, opening.end())
        following = OPENING.search(text, opening.end())
        if end < 0 or (following and following.start() < end):
            raise DataError(f"{source}, line {line}: the table has no {CLOSING}: add it")
        try:
            table = make_table(opening["request"], root)
        except HalveError as error:
            raise DataError(f"{source}, line {line}: {error}") from error
        done += [text[position : opening.end()], table]
        position = end
    return "".join([*done, text[position:]])


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
    return comparison.markdown() + _footnotes(comparison.notes)


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
    header = [title.strip() or key.strip() for key, _, title in pairs]
    ruler = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(cells) + " |\n" for cells in [header, ruler, *rows]]
    return "".join(lines) + _footnotes(circumstances(records))


def reproduction_table(records: list[Record], columns: str | None) -> str:
    """One of the two tables of a reproduction: columns="models" or columns="fractions"."""
    kinds = {"models": model_table, "fractions": fraction_table}
    if columns not in kinds or len(records) != 1 or records[0]["kind"] != "reproduction":
        raise DataError(f"reproduction needs one record of halve reproduce and columns={' or '.join(kinds)}")
    table = kinds[columns](records[0])
    return table.markdown() + _footnotes(table.notes)


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
        return Path(value).name
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value).replace("|", r"\|")
    if key.endswith("accuracy"):
        return f"{100 * value:.1f} %"
    if key.endswith("_bytes"):
        return show_bytes(value)
    if key.endswith("_share"):
        return show_share(value)
    return f"{value:,}" if isinstance(value, int) or (abs(value) >= 1000 and value.is_integer()) else f"{value:.4g}"


def _footnotes(notes: list[str]) -> str:
    return "".join(f"\n<sub>{note}</sub>\n" for note in notes)


def pages(root: Path) -> list[Path]:
    """The pages that may hold tables."""
    return [path for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))] if path.is_file()]


def update(root: Path, check: bool) -> list[Path]:
    """Rewrite the tables below `root`, or with `check` only find them; returns the pages that are stale."""
    stale = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        name = str(page.relative_to(root))
        fresh = render(text, root, name)
        if fresh == text:
            continue
        stale.append(page)
        if check:
            lines = difflib.unified_diff(
                text.splitlines(), fresh.splitlines(), name, "from the records", lineterm="", n=0
            )
            sys.stderr.write("\n".join(lines) + "\n")
        else:
            page.write_text(fresh, encoding="utf-8")
    return stale


def main() -> int:
    """The program; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a table is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    arguments = parser.parse_args()
    try:
        stale = update(arguments.root, arguments.check)
    except HalveError as error:
        print(error, file=sys.stderr)
        return 2
    for page in stale:
        print(f"{page.relative_to(arguments.root)}: {'stale, run make docs' if arguments.check else 'rewritten'}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
