"""Records of several models as one table: speed, memory and quality of each in a row, the first row as the baseline."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from halve.errors import DataError
from halve.escapes import csv_cell, markdown, plain
from halve.measure.quality.statistics import paired_records
from halve.measure.quality.tasks import figure_of
from halve.measure.records import AnyRecord, Measurement
from halve.measure.units import (
    show_accuracy,
    show_bytes,
    show_difference,
    show_floor_share,
    show_kl,
    show_percent,
    show_perplexity,
)

MISSING = "-"
Row = dict[str, Any]  # column key -> number or text; a missing figure has no key


@dataclass(frozen=True)
class Column:
    """One column of the printed table; `keys` are the row's values it shows, and the columns of the CSV."""

    title: str
    keys: tuple[str, ...]
    show: Callable[..., str]
    setup: str = ""  # what was asked, of a column of an evaluation's figure

    def text(self, row: Row) -> str:
        values = [row.get(key) for key in self.keys]
        return MISSING if values[0] is None else self.show(*values)

    def is_text(self, row: Row) -> bool:
        """Whether the row holds words here, which may be a name out of a file."""
        return isinstance(row.get(self.keys[0]), str)


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
        """A Markdown table, numbers to the right, and the notes below it."""
        titles = [column.title for column in self.columns]
        rows = [[markdown(c.text(row)) if c.is_text(row) else c.text(row) for c in self.columns] for row in self.rows]
        return markdown_table(titles, rows, self.notes)

    def csv(self) -> str:
        """Unrounded values, one column for each key, empty where a figure is missing."""
        text = io.StringIO()
        keys = [key for column in self.columns for key in column.keys]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(
            [[csv_cell(key) for key in keys], *([csv_cell(row.get(k)) for k in keys] for row in self.rows)]
        )
        return text.getvalue()

    def print(self) -> None:
        """Print the table to stdout, fitted to the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(self.columns):
            table.add_column(plain(column.title), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            # intervals and p-values on a line of their own, so that columns stay narrow
            texts = [(plain(column.text(row)), column.is_text(row)) for column in self.columns]
            table.add_row(*(text if words else re.sub(r" (?=[\[(])", "\n", text) for text, words in texts))
        console = Console(markup=False, emoji=False)
        console.print(table)
        for note in self.notes:
            console.print(plain(note), style="dim", highlight=False)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A Markdown table of cells that are Markdown already, numbers to the right, and notes below it."""
    ruler = ["---", *["---:"] * (len(titles) - 1)]
    lines = [[markdown(title) for title in titles], ruler, *rows]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return table + "".join(f"\n<sub>{markdown(note)}</sub>\n" for note in notes)


SPEED_COLUMNS = (
    Column("latency (ms)", ("latency_ms",), "{:.2f}".format),
    Column("tokens/s", ("decode_tokens_per_s",), "{:.1f}".format),
    Column("decode (ms)", ("decode_ms_median", "decode_ms_p10", "decode_ms_p90"), lambda m, *_: f"{m:.2f}"),
    Column("speed to the first row", ("decode_speed_to_first",), "{:.2f}x".format),
    Column("TTFT (ms)", ("ttft_ms",), "{:.1f}".format),
    Column("peak memory", ("peak_memory_bytes",), show_bytes),
    Column("peak memory, long prompt", ("long_prompt_peak_memory_bytes",), show_bytes),
    Column("weights", ("weight_bytes",), show_bytes),
    Column("share of floor", ("floor_share", "floor_beside_share_p10", "floor_beside_share_p90"), show_floor_share),
)


@dataclass(frozen=True)
class _Row:
    """What stands in one row: at most one benchmark of a model, and its evaluations by their setup in words."""

    model: Measurement
    benchmark: AnyRecord | None
    evaluations: dict[str, AnyRecord]


def compare(records: Iterable[AnyRecord]) -> Comparison:
    """Put evaluation and benchmark records of the same model into one row, in the order given.

    What `Measurement` tells apart is another row (another model, dtype or device) or another column (another question), and
    the row or the column says in what it differs; of equal measurements the newest counts. Latency is the time to one
    generated token, in records of a study that times it. A paired test clustered by article compares each row's answers with
    the first row's, where both records hold them. Raises DataError when there is nothing to show.
    """
    newest, replaced = _newest(records)
    setups = evaluation_setups(newest)
    found = _rows(newest, setups)
    if not found:
        raise DataError("no evaluation and no benchmark among the records: make one with --json FILE")
    notes = [f"{replaced} older records of the same measurement are not shown"] if replaced else []
    titles = _evaluation_titles(newest, setups)
    labels = _labels(found)
    rows: list[Row] = []
    for one, label in zip(found, labels, strict=True):
        row: Row = {"model": label}
        _fill_speed(row, one.benchmark, found[0].model.model)
        _fill_quality(row, label, one, found[0], notes)
        rows.append(row)
    columns = [Column("model", ("model",), str), *_places(found, rows, notes), *SPEED_COLUMNS]
    for setup, (figure, title) in titles.items():
        columns += _quality_columns(setup, figure, title)
    compared = _compared_setups(found)
    for number, words in enumerate(compared, 1):
        columns += _divergence_columns(words, suffix := "" if len(compared) == 1 else f" {number}")
        notes.append(f"KL{suffix}: {words}")
    shown = [c for c in columns if any(row.get(c.keys[0]) is not None for row in rows)]
    asked = [f"{title}: {setup.removeprefix(f'{figure}, ')}" for setup, (figure, title) in titles.items()]
    benchmarks = [one.benchmark for one in found if one.benchmark is not None]
    return Comparison(shown, rows, list(dict.fromkeys(asked + notes + circumstances(benchmarks))))


def _newest(records: Iterable[AnyRecord]) -> tuple[dict[Measurement, AnyRecord], int]:
    """Evaluations and benchmarks, the newest of every measurement, and how many older ones there are."""
    newest: dict[Measurement, AnyRecord] = {}
    replaced = 0
    for record in records:
        if record["kind"] not in ("benchmark", "evaluation"):
            continue
        key = Measurement.of(record)
        replaced += key in newest
        if key not in newest or record.get("date", "") >= newest[key].get("date", ""):
            newest[key] = record
    return newest, replaced


def evaluation_setups(keys: Iterable[Measurement]) -> dict[Measurement, str]:
    """What every evaluation asked, in words: equal words mean equal questions, and only such share a column."""
    words: dict[str, dict[tuple[tuple[str, Any], ...], None]] = {}
    evaluations = [key for key in keys if key.kind == "evaluation"]
    for key in evaluations:
        words.setdefault(_words(dict(key.what)), {})[key.what] = None
    setups = {}
    for key in evaluations:
        text = _words(what := dict(key.what))
        others = list(words[text])
        if len(others) > 1:  # data of one name that are not the same
            digest = str(what["data_sha256"])[:12]
            alike = [other for other in others if str(dict(other)["data_sha256"])[:12] == digest]
            text += f", sha256 {digest}" + (f" ({alike.index(key.what) + 1})" if len(alike) > 1 else "")
        setups[key] = text
    return setups


def _words(what: dict[str, Any]) -> str:
    parts = [str(what[key]) for key in ("task", "protocol", "template", "data") if what[key]]
    return ", ".join(parts + [f"{key} {what[key]}" for key in ("window", "limit", "sampling") if what[key]])


def _rows(newest: dict[Measurement, AnyRecord], setups: dict[Measurement, str]) -> list[_Row]:
    """The rows of every model, in the order in which models were first named.

    A benchmark stands beside the evaluations in its own dtype and on its own device. Where all evaluations of a model
    were made in one other way it stands beside those, and columns say in what each was measured.
    """
    models: dict[tuple[Any, ...], list[Measurement]] = {}
    for key in newest:
        models.setdefault((key.model, key.random_weights, key.recipe), []).append(key)
    rows = []
    for keys in models.values():
        ways: dict[tuple[str | None, str | None], dict[str, AnyRecord]] = {}
        for key in keys:
            if key.kind == "evaluation":
                ways.setdefault((key.dtype, key.device), {})[setups[key]] = newest[key]
        benchmarks = [key for key in keys if key.kind == "benchmark"]
        own = {(key.dtype, key.device) for key in benchmarks} & ways.keys()
        beside = next(iter(ways)) if len(ways) == 1 and not own else None
        rows += [_Row(key, newest[key], ways.get(beside or (key.dtype, key.device), {})) for key in benchmarks]
        left = [way for way in ways if way not in own and not (benchmarks and way == beside)]
        rows += [_Row(_key_of(keys, way), None, ways[way]) for way in left]
    return rows


def _key_of(keys: Sequence[Measurement], way: tuple[str | None, str | None]) -> Measurement:
    return next(key for key in keys if key.kind == "evaluation" and (key.dtype, key.device) == way)


def _labels(rows: Sequence[_Row]) -> list[str]:
    """What each row is called: the model's name, and whatever else tells it from the other rows of that name."""
    labels = []
    names = {PurePath(row.model.model).name: set() for row in rows}
    for row in rows:
        names[PurePath(row.model.model).name].add(row.model.model)
    for row in rows:
        short = PurePath(row.model.model).name
        alike = [other.model for other in rows if other.model.model == row.model.model]
        extras = ["random weights"] if row.model.random_weights else []
        if len({key.recipe for key in alike if not key.random_weights}) > 1 and not row.model.random_weights:
            extras.append(_recipe_words(row.model.recipe))
        same = [
            _told(key)
            for key in alike
            if (key.random_weights, key.recipe) == (row.model.random_weights, row.model.recipe)
        ]
        own = _told(row.model)
        extras += [f"{key.replace('_', ' ')} {own[key]}" for key in own
                   if any(key in other and other[key] != own[key] for other in same)]  # fmt: skip
        label = short if len(names[short]) == 1 else row.model.model
        labels.append(f"{label} ({', '.join(extras)})" if extras else label)
    return labels


def _told(key: Measurement) -> dict[str, Any]:
    """What tells rows of one model apart, by the name that a label gives it."""
    return {"dtype": key.dtype, "device": key.device} | (dict(key.what) if key.kind == "benchmark" else {})


def _recipe_words(recipe: str) -> str:
    """All steps with all their options."""
    words = []
    for step in json.loads(recipe):
        options = {} if isinstance(step, str) else {k: v for k, v in step.items() if k != "step"}
        name = step if isinstance(step, str) else str(step.get("step"))
        words.append(name + "".join(f" {key}={value}" for key, value in options.items()))
    return " + ".join(words) or "no recipe"


def _places(found: Sequence[_Row], rows: Sequence[Row], notes: list[str]) -> list[Column]:
    """Columns that say in what quality and speed were measured, filled in; none where it is one dtype on one device.

    Where all rows agree and quality was measured in another dtype than speed, a note says so too.
    """
    ways: dict[str, set[str]] = {"quality_in": set(), "speed_in": set()}
    dtypes: dict[str, set[str]] = {"quality_in": set(), "speed_in": set()}
    for one, row in zip(found, rows, strict=True):
        quality = next(iter(one.evaluations.values()), None)
        for key, record, device in (("quality_in", quality, "device"), ("speed_in", one.benchmark, "device_name")):
            told = [] if record is None else [str(record[k]) for k in ("dtype", device) if record.get(k)]
            if record is not None and told:
                row[key] = ", ".join(told)
                ways[key].add(row[key])
                dtypes[key].add(str(record.get("dtype")))
    if len(set().union(*dtypes.values())) > 1 and all(len(values) == 1 for values in dtypes.values()):
        quality_in, speed_in = (next(iter(values)) for values in dtypes.values())
        notes.append(f"Quality measured in {quality_in}, speed in {speed_in}.")
    elif all(len(values) <= 1 for values in ways.values()):
        return []
    return [Column("quality in", ("quality_in",), str), Column("speed in", ("speed_in",), str)]


def _evaluation_titles(
    newest: dict[Measurement, AnyRecord], setups: dict[Measurement, str]
) -> dict[str, tuple[str, str]]:
    """Figure and column title of every setup among the records; how it was measured stands below the table."""
    figures: dict[str, str] = {}
    for key, setup in setups.items():
        figures.setdefault(setup, figure_of(newest[key]))
    titles = {}
    for setup, figure in figures.items():
        alike = [other for other in figures if figures[other] == figure]
        titles[setup] = figure, figure if len(alike) == 1 else f"{figure} {alike.index(setup) + 1}"
    return titles


def _quality_columns(setup: str, figure: str, title: str) -> list[Column]:
    if figure != "accuracy":
        show = show_perplexity if figure == "perplexity" else "{:.4g}".format
        return [Column(title, (f"{figure} ({setup})",), show, setup)]
    keys = (f"accuracy ({setup})", f"accuracy_ci95_low ({setup})", f"accuracy_ci95_high ({setup})")
    paired = tuple(f"{name} ({setup})" for name in ("difference_to_first", "p_value"))
    return [Column(title, keys, show_accuracy, setup), Column("to the first row", paired, show_difference)]


def _compared_setups(found: Sequence[_Row]) -> list[str]:
    """What was asked and of which base, of every comparison with one: only figures of equal words share a column."""
    pairs = (pair for one in found for pair in one.evaluations.items())
    return list(dict.fromkeys(_against(*pair) for pair in pairs if pair[1].get("base")))


def _against(setup: str, record: AnyRecord) -> str:
    name, base = PurePath(record["base"]["model"]).name, record["base"]
    kept = f", {base['kept']} tokens kept" if base["kept"] else ""
    return f"{setup}, against {name} {base['fingerprint'][:8]} ({base['dtype']}{kept})"


def _divergence_keys(words: str) -> list[str]:
    return [*(f"kl_nats_per_token{end} ({words})" for end in ("", "_low", "_high")), f"same_top_share ({words})"]


def _divergence_columns(words: str, number: str) -> list[Column]:
    *kl, same_top = _divergence_keys(words)
    return [
        Column(f"KL{number}", tuple(kl), show_kl, words),
        Column(f"same top{number}", (same_top,), show_percent, words),
    ]


def _fill_speed(row: Row, benchmark: AnyRecord | None, first: str) -> None:
    if benchmark is None:
        return
    for column in SPEED_COLUMNS:
        for key in column.keys:
            row[key] = benchmark.get(key)
    row["long_prompt_peak_memory_bytes"] = (benchmark.get("long_prompt") or {}).get("peak_memory_bytes")
    # the key under which a study records its own timing of a whole one-token call, see studies/system1/protocol.py
    row["latency_ms"] = (benchmark.get("system1") or {}).get("latency_ms")
    # a ratio is taken only from runs that took turns on one machine
    beside = benchmark.get("side_by_side")
    if beside and beside["models"] and os.path.normpath(beside["models"][0]) == first:
        row["decode_speed_to_first"] = beside["decode_speed_to_first"]


def _fill_quality(row: Row, label: str, own: _Row, first: _Row, notes: list[str]) -> None:
    for setup, record in own.evaluations.items():
        if record.get("base"):
            low, high = record["kl_nats_per_token_interval"] or (None, None)
            figures = (record["kl_nats_per_token"], low, high, record["same_top_share"])
            row |= zip(_divergence_keys(_against(setup, record)), figures, strict=True)
        if (figure := figure_of(record)) != "accuracy":
            unbounded = figure in record.get("not_measured", {}) or figure in record.get("not_finite", {})
            row[f"{figure} ({setup})"] = math.inf if unbounded else record.get(figure)
            continue
        undefined = "undefined" if record.get("questions") else None
        row[f"accuracy ({setup})"] = undefined if record.get("accuracy") is None else record["accuracy"]
        low, high = record.get("accuracy_ci95") or (None, None)
        row[f"accuracy_ci95_low ({setup})"], row[f"accuracy_ci95_high ({setup})"] = low, high
        baseline = first.evaluations.get(setup)
        if own is first or baseline is None:
            continue
        try:
            test = paired_records(record, baseline)
        except DataError as error:
            notes.append(f"{label} is not tested against the first row: {error}")
            continue
        row[f"difference_to_first ({setup})"], row[f"p_value ({setup})"] = test.difference, test.p_value


def circumstances(records: Iterable[AnyRecord]) -> list[str]:
    """Sentences about where the speeds among the records were measured."""
    records = list(records)
    places: dict[str, None] = {}
    for record in records:
        if record["kind"] == "benchmark":
            machine = record["machine"]
            cores = f"{machine.get('cores')} cores, {machine.get('threads')} used by PyTorch"
            places[f"{record.get('device_name')}, {cores}, torch {record['torch_version']}"] = None
    notes = [f"Speed measured on: {'; '.join(places)}."] if places else []
    peaks = {r["peak_memory_prompt_tokens"] for r in records
             if r.get("peak_memory_bytes") is not None and r.get("peak_memory_prompt_tokens") is not None}  # fmt: skip
    if peaks:
        notes.append(f"Peak memory: with a prompt of {' or '.join(map(str, sorted(peaks)))} tokens.")
    if len(places) > 1:
        notes.append("Rows come from different machines or settings: their times are not comparable.")
    return notes
