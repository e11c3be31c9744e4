"""Records of several models as one table: speed, memory and quality of each in a row, the first row as the baseline."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from halve.errors import DataError
from halve.measure.quality.statistics import paired_records
from halve.measure.quality.tasks import figure_of
from halve.measure.records import AnyRecord
from halve.measure.units import show_accuracy, show_bytes, show_difference, show_perplexity, show_share

MISSING = "-"
Row = dict[str, Any]  # column key -> number or text; a missing figure has no key


@dataclass(frozen=True)
class Column:
    """One column of the printed table; `keys` are the row's values it shows, and the columns of the CSV."""

    title: str
    keys: tuple[str, ...]
    show: Callable[..., str]

    def text(self, row: Row) -> str:
        values = [row.get(key) for key in self.keys]
        return MISSING if values[0] is None else self.show(*values)


@dataclass(frozen=True)
class Comparison:
    """Rows in the order their models were first named, the columns that apply, and what a reader has to know."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str]

    def only(self, keys: Sequence[str]) -> Comparison:
        """The same with the columns of these first keys or titles, in that order; DataError for an unknown one."""
        by_key = {column.title: column for column in self.columns} | {c.keys[0]: c for c in self.columns}
        unknown = [key for key in keys if key not in by_key]
        if unknown:
            raise DataError(f"no column {', '.join(unknown)}: use some of {', '.join(c.keys[0] for c in self.columns)}")
        return Comparison([by_key[key] for key in keys], self.rows, self.notes)

    def markdown(self) -> str:
        """A Markdown table, numbers to the right."""
        header = [column.title for column in self.columns]
        ruler = ["---", *["---:"] * (len(header) - 1)]
        body = [[column.text(row).replace("|", "\\|") for column in self.columns] for row in self.rows]
        return "".join("| " + " | ".join(cells) + " |\n" for cells in [header, ruler, *body])

    def csv(self) -> str:
        """Unrounded values, one column for each key, empty where a figure is missing."""
        text = io.StringIO()
        keys = [key for column in self.columns for key in column.keys]
        writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def print(self) -> None:
        """Print the table to stdout, fitted to the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(self.columns):
            table.add_column(column.title, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            # intervals and p-values on a line of their own, so that columns stay narrow
            table.add_row(*(re.sub(r" (?=[\[(])", "\n", column.text(row)) for column in self.columns))
        console = Console()
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False)


SPEED_COLUMNS = (
    Column("latency (ms)", ("latency_ms",), "{:.2f}".format),
    Column("tokens/s", ("decode_tokens_per_s",), "{:.1f}".format),
    Column("decode (ms)", ("decode_ms_median", "decode_ms_p10", "decode_ms_p90"), lambda m, *_: f"{m:.2f}"),
    Column("speed to the first row", ("decode_speed_to_first",), "{:.2f}x".format),
    Column("TTFT (ms)", ("ttft_ms",), "{:.1f}".format),
    Column("peak memory", ("peak_memory_bytes",), show_bytes),
    Column("weights", ("weight_bytes",), show_bytes),
    Column("share of floor", ("floor_share",), show_share),
)


@dataclass
class _Group:
    """All records of one model."""

    name: str
    random_weights: bool
    benchmarks: dict[str, AnyRecord] = field(default_factory=dict)
    evaluations: dict[str, AnyRecord] = field(default_factory=dict)


def compare(records: Iterable[AnyRecord]) -> Comparison:
    """Put evaluation and benchmark records of the same model into one row, in the order given.

    Latency is the time to one generated token, in records of a study that times it. Where two records measure the same
    thing the newer counts. A paired test clustered by article compares each row's answers with the first row's, where both
    records hold them. Raises DataError when there is nothing to show.
    """
    groups, notes = _grouped(records)
    titles = _evaluation_titles(groups)
    rows: list[Row] = []
    for group in groups:
        benchmarks = list(group.benchmarks.values())
        for benchmark in benchmarks or [None]:
            row: Row = {"model": _label(group, groups, benchmark, benchmarks)}
            _fill_speed(row, benchmark, groups[0].name)
            _fill_quality(row, group, groups[0], notes)
            rows.append(row)
    if not rows:
        raise DataError("no evaluation and no benchmark among the records: make one with --json FILE")
    columns = [Column("model", ("model",), str), *SPEED_COLUMNS]
    for setup, (figure, title) in titles.items():
        columns += _quality_columns(setup, figure, title)
    shown_benchmarks = [b for group in groups for b in group.benchmarks.values()]
    shown = [c for c in columns if any(row.get(c.keys[0]) is not None for row in rows)]
    setups = [f"{title}: {setup.removeprefix(f'{figure}, ')}" for setup, (figure, title) in titles.items()]
    return Comparison(shown, rows, list(dict.fromkeys(setups + notes + circumstances(shown_benchmarks))))


def _grouped(records: Iterable[AnyRecord]) -> tuple[list[_Group], list[str]]:
    groups: dict[tuple[str, bool], _Group] = {}
    replaced = 0
    for record in records:
        if record["kind"] not in ("benchmark", "evaluation"):
            continue
        name, random = os.path.normpath(record["model"]), bool(record.get("random_weights"))
        group = groups.setdefault((name, random), _Group(name, random))
        if record["kind"] == "benchmark":
            kept, key = group.benchmarks, str(benchmark_setup(record))
        else:
            kept, key = group.evaluations, evaluation_setup(record)
        replaced += key in kept
        if key not in kept or record.get("date", "") >= kept[key].get("date", ""):
            kept[key] = record
    notes = [f"{replaced} older records of the same measurement are not shown"] if replaced else []
    return list(groups.values()), notes


def benchmark_setup(record: AnyRecord) -> dict[str, Any]:
    """What a model's benchmarks have to share to be one row."""
    keys = ("device_name", "dtype", "backend", "prompt_tokens", "new_tokens")
    return {key: record.get(key) for key in keys} | {"threads": record["machine"].get("threads")}


def evaluation_setup(record: AnyRecord) -> str:
    """What an evaluation measured, in words: only equal setups share a column."""
    parts = [record.get("task"), record.get("protocol"), record.get("template"), record.get("data")]
    words = [str(part) for part in parts if part]
    words += [f"{name} {record[name]}" for name in ("window", "limit") if record.get(name)]
    return ", ".join(words)


def _evaluation_titles(groups: Sequence[_Group]) -> dict[str, tuple[str, str]]:
    """Figure and column title of every evaluation setup among the records; how it was measured stands below the table."""
    figures: dict[str, str] = {}
    for group in groups:
        for setup, record in group.evaluations.items():
            figures.setdefault(setup, figure_of(record))
    titles = {}
    for setup, figure in figures.items():
        alike = [other for other in figures if figures[other] == figure]
        titles[setup] = figure, figure if len(alike) == 1 else f"{figure} {alike.index(setup) + 1}"
    return titles


def _quality_columns(setup: str, figure: str, title: str) -> list[Column]:
    if figure != "accuracy":
        show = show_perplexity if figure == "perplexity" else "{:.4g}".format
        return [Column(title, (f"{figure} ({setup})",), show)]
    keys = (f"accuracy ({setup})", f"accuracy_ci95_low ({setup})", f"accuracy_ci95_high ({setup})")
    paired = tuple(f"{name} ({setup})" for name in ("difference_to_first", "p_value"))
    return [Column(title, keys, show_accuracy), Column("to the first row", paired, show_difference)]


def _label(group: _Group, groups: Sequence[_Group], benchmark: AnyRecord | None, setups: Sequence[AnyRecord]) -> str:
    short = PurePath(group.name).name
    alike = {g.name for g in groups if PurePath(g.name).name == short}
    label = short if len(alike) == 1 else group.name
    extras = ["random weights"] if group.random_weights else []
    if benchmark is not None:
        all_setups, own = [benchmark_setup(s) for s in setups], benchmark_setup(benchmark)
        differing = [key for key in own if any(other[key] != own[key] for other in all_setups)]
        extras += [f"{key.replace('_', ' ')} {own[key]}" for key in differing]
    return f"{label} ({', '.join(extras)})" if extras else label


def _fill_speed(row: Row, benchmark: AnyRecord | None, first: str) -> None:
    if benchmark is None:
        return
    for column in SPEED_COLUMNS:
        for key in column.keys:
            row[key] = benchmark.get(key)
    # the key under which a study records its own timing of a whole one-token call, see studies/system1/protocol.py
    row["latency_ms"] = (benchmark.get("system1") or {}).get("latency_ms")
    # a ratio is taken only from runs that took turns on one machine
    beside = benchmark.get("side_by_side")
    if beside and os.path.normpath(beside["models"][0]) == first:
        row["decode_speed_to_first"] = beside["decode_speed_to_first"]


def _fill_quality(row: Row, group: _Group, first: _Group, notes: list[str]) -> None:
    for setup, record in group.evaluations.items():
        if (figure := figure_of(record)) != "accuracy":
            unbounded = figure in record.get("not_measured", {}) or figure in record.get("not_finite", {})
            row[f"{figure} ({setup})"] = math.inf if unbounded else record.get(figure)
            continue
        undefined = "undefined" if record.get("questions") else None
        row[f"accuracy ({setup})"] = undefined if record.get("accuracy") is None else record["accuracy"]
        low, high = record.get("accuracy_ci95") or (None, None)
        row[f"accuracy_ci95_low ({setup})"], row[f"accuracy_ci95_high ({setup})"] = low, high
        baseline = first.evaluations.get(setup)
        if group is first or baseline is None:
            continue
        try:
            test = paired_records(record, baseline)
        except DataError as error:
            notes.append(f"{group.name} is not tested against the first row: {error}")
            continue
        row[f"difference_to_first ({setup})"], row[f"p_value ({setup})"] = test.difference, test.p_value


def circumstances(records: Iterable[AnyRecord]) -> list[str]:
    """Sentences about where the speeds among the records were measured."""
    places: dict[str, None] = {}
    for record in records:
        if record["kind"] == "benchmark":
            machine = record["machine"]
            cores = f"{machine.get('cores')} cores, {machine.get('threads')} used by PyTorch"
            places[f"{record.get('device_name')}, {cores}, torch {record['torch_version']}"] = None
    notes = [f"Speed measured on: {'; '.join(places)}."] if places else []
    if len(places) > 1:
        notes.append("Rows come from different machines or settings: their times are not comparable.")
    return notes
