"""A reproduction's record as the two tables of the first system, theirs and ours side by side."""

from __future__ import annotations

from typing import Any

from halve.measure.records import Record
from halve.measure.table import Column, Comparison, Row, circumstances
from halve.measure.units import show_accuracy, show_bytes, show_fraction, show_percent
from halve.studies.system1 import published, variants
from halve.studies.system1.protocol import SYSTEM1
from halve.studies.system1.variants import PROCEDURES

_NOT_MEASURED = "not measured"
MODEL_COLUMNS = [
    Column("model", ("model",), str),
    Column("measured", ("way",), str),
    Column("one token (ms)", ("latency_ms",), "{:.2f}".format),
    Column("tokens/s", ("tokens_per_s",), "{:.1f}".format),
    Column("peak memory", ("peak_memory_bytes",), show_bytes),
    Column("weights", ("weight_bytes",), show_bytes),
    Column("accuracy", ("accuracy", "low", "high"), show_accuracy),
    Column("answered", ("answered",), str),
]
FRACTION_COLUMNS = [
    Column("model", ("model",), str),
    Column("pruned", ("side",), str),
    Column("published", ("published",), str),
    *(Column(procedure.title, (procedure.key,), str) for procedure in PROCEDURES),
]


def model_table(record: Record) -> Comparison:
    """Latency, tokens/s, peak memory and accuracy of every model: published, its own way, the right way."""
    rows: list[Row] = []
    for model in record["models"]:
        name = variants.label(model["bits"], model["pruned"])
        rows.append(model["published"] | {"model": name, "way": "published"})
        for procedure in PROCEDURES:
            figures = model[procedure.key]
            row = figures | {"model": name, "way": procedure.title}
            row["low"], row["high"] = figures.get("accuracy_ci95") or (None, None)
            if record["random_weights"]:
                row["accuracy"] = _NOT_MEASURED
            else:
                row["accuracy"] = "undefined" if figures.get("accuracy") is None else figures["accuracy"]
                row["answered"] = f"{figures.get('answered')} of {figures.get('questions')}"
            rows.append(row)
    return Comparison(MODEL_COLUMNS, rows, _notes(record))


def fraction_table(record: Record) -> Comparison:
    """The largest share of inputs or outputs that can be pruned above the accuracy floor."""
    rows: list[Row] = []
    for cell in record["fractions"]:
        row: Row = {"model": variants.label(cell["bits"]), "side": cell["side"]}
        row["published"] = (
            show_fraction(cell["largest"]) if cell["largest"] else f"below {show_fraction(published.SMALLEST)}"
        )
        rows.append(row | {procedure.key: _largest(cell[procedure.key]) for procedure in PROCEDURES})
    floor = show_fraction(record["floor"])
    notes = [
        f"Each cell: the largest fraction tried with an accuracy above {floor}, and the next one tried. Its own way prunes "
        "the head alone in quantized models and every linear in bf16; the right way prunes every linear."
    ]
    return Comparison(FRACTION_COLUMNS, rows, notes)


def tables(record: Record) -> list[tuple[str, Comparison]]:
    """The tables a record holds, with their titles."""
    titled = [("The first system's table of models", model_table(record))]
    if record["fractions"]:
        titled.append(("Largest fraction pruned above the accuracy floor", fraction_table(record)))
    return titled


def _largest(search: dict[str, Any]) -> str:
    tried = search["tried"]
    at = next((point for point in tried if point["fraction"] == search["largest"]), None)
    if at is None:
        return f"{_accuracy(tried[0])} unpruned" if tried else _NOT_MEASURED
    after = [f"{show_fraction(p['fraction'])}: {_accuracy(p)}" for p in tried if p["fraction"] > search["largest"]]
    first = f"{show_fraction(at['fraction'])}: {_accuracy(at)}" if at["fraction"] else f"none: {_accuracy(at)} unpruned"
    return "; ".join([first, *after[:1]])


def _accuracy(point: dict[str, Any]) -> str:
    return "undefined" if point["accuracy"] is None else show_percent(point["accuracy"])


def _notes(record: Record) -> list[str]:
    notes = [
        f"Published: {record['published']['model']} on {record['published']['machine']}, {record['published']['questions']}. "
        f"Measured here: {record['model']}" + (", random weights." if record["random_weights"] else ".")
    ]
    notes.append(
        "Its own way: the head alone pruned, wall time of one token, 100 / (t(101) - t(1)) tokens/s. The right way: every "
        "linear pruned, time to the first token, median decode speed."
    )
    for procedure in PROCEDURES:
        exam = record["exams"].get(procedure.key)
        if exam:
            count = f"first {exam['limit']} questions" if exam["limit"] else "all questions"
            over = "right / answered" if exam["protocol"] == SYSTEM1.name else "right / all, 95 % interval"
            notes.append(
                f"Accuracy, {procedure.title}: {exam['protocol']}, {exam['data'] or 'RACE-H test'}, {count}, {over}."
            )
    return notes + circumstances([record | {"kind": "benchmark"}]) + record["notes"]
