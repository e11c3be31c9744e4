"""The sections about studies: a search for the smallest model within a limit, and a published table made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halve.measure.records import Record
from halve.measure.units import show_bytes, show_difference, show_percent
from halve.report import plots
from halve.report.blocks import FactsBlock, Plot, PlotsBlock, Section, TableBlock
from halve.report.contents import Contents
from halve.report.models import step_text
from halve.studies.search.figures import FIGURES, UNITS, Figure, Judged, qualities
from halve.studies.search.plot import by_objective, by_option
from halve.studies.system1.tables import tables

_MOST_VARIED = 3  # options with a plot of their own


def searches(contents: Contents) -> Section:
    """Winner, plot, front and trials of every search."""
    section = Section("search", "Search")
    for place, record in contents.searches.items():
        title = str(place.parent) if len(contents.searches) > 1 else ""
        section.blocks.append(FactsBlock(_facts(record), title))
        section.blocks.append(_plots(record))
        front = record.get("pareto") or []
        if len(front) > 1:
            section.blocks.append(_trial_table(record, front, "Pareto front"))
        notes = list(record.get("notes", []))
        section.blocks.append(_trial_table(record, record["trials"], f"All {len(record['trials'])} trials", notes))
    return section


def _facts(record: Record) -> list[tuple[str, str]]:
    floor, judged = record["floor"], Judged.of(record)
    asked = [f"{one['name']} from {one['low']:g} to {one['high']:g}" for one in record["varied"]]
    data = [
        f"{record[key][unit]} {unit} of {record[key]['name']}"
        for key in ("search_data", "held_out_data")
        if record.get(key)
        for unit in UNITS
        if unit in record[key]
    ]
    protocol = ", ".join(str(record[key]) for key in ("task", "protocol", "template") if record.get(key))
    level = judged.limited.bound(floor[judged.limited.key])
    about = [
        ("model", record["model"]),
        ("recipe", ", then ".join(step_text(step) for step in record["recipe"])),
        ("varied", "; ".join(asked)),
        ("floor", level + (", by the interval's worse end" * bool(floor.get("lower_bound")))),
        ("most" if judged.objective.more_is_better else "least", judged.objective.label),
        ("asked", " to search, ".join(data) + (" to confirm" if len(data) > 1 else "") + f" ({protocol})"),
    ]
    if record.get("kept_tokens"):
        about.append(("KL", f"a lower bound, from the {record['kept_tokens']:,} most probable tokens"))
    return [*_winner(record.get("winner"), judged.quality), *about]


def _winner(winner: dict[str, Any] | None, quality: Figure) -> list[tuple[str, str]]:
    """The winner first: it is what the search was for."""
    if winner is None:
        return [("winner", "none: no trial clears the floor")]
    share = winner.get("bytes_share")
    facts = [
        ("winner", _parameters(winner)),
        (
            FIGURES["bytes"].label,
            show_bytes(winner["bytes"]) + ("" if share is None else f", {show_percent(share, 0)} of dense"),
        ),
    ]
    for figure in qualities(winner):
        facts.append((f"{figure.label}, search", figure.show_row(winner)))
        if winner.get(f"held_out_{figure.key}") is not None:
            verdict = {True: ", confirmed", False: ", NOT confirmed"}.get(winner.get("confirmed", ""), "")
            shown = figure.show_row(winner, "held_out_") + verdict * (figure is quality)
            facts.append((f"{figure.label}, held out", shown))
    if winner.get("held_out_difference_to_dense") is not None:
        test = winner["held_out_difference_to_dense"], winner.get("held_out_difference_p_value")
        facts.append(("to the dense model", show_difference(*test)))
    return facts


def _parameters(trial: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in trial["parameters"].items())


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _trial_table(record: Record, trials: Sequence[dict[str, Any]], title: str, notes: Sequence[str] = ()) -> TableBlock:
    names = list(dict.fromkeys(name for trial in trials for name in trial["parameters"]))
    judged = [figure for figure in qualities(record["dense"]) if all(figure.key in trial for trial in trials)]
    cost = Judged.of(record).cost
    beside = [] if cost.key == "bytes" else [cost]
    rows = []
    for trial in sorted(trials, key=Judged.of(record).cost_of):
        values = [_value(trial["parameters"].get(name, "-")) for name in names]
        figures = [figure.show_row(trial) for figure in judged]
        measured = [one.show(trial["objective"]) for one in beside]
        rows.append([*values, *figures, "yes" if trial["feasible"] else "no", show_bytes(trial["bytes"]), *measured])
    labels = [figure.label for figure in judged]
    header = [*names, *labels, "clears the floor", FIGURES["bytes"].label, *(one.label for one in beside)]
    return TableBlock(header, rows, title, notes, text_columns=0)


def _plots(record: Record) -> PlotsBlock:
    """Quality against what a model costs, with the front, and against each varied option."""
    caption = f"{record['model']}: every trial, the Pareto front, the floor and the winner"
    pictures = [Plot(plots.draw(by_objective(record), caption), caption)]
    for one in record["varied"][:_MOST_VARIED]:
        caption = f"{Judged.of(record).quality.label} by {one['name']}"
        pictures.append(Plot(plots.draw(by_option(record, one["name"]), caption), caption))
    return PlotsBlock(pictures)


def reproductions(contents: Contents) -> Section:
    """Published tables beside what was measured here."""
    section = Section("reproduction", "Published tables, made again")
    for record in contents.reproductions.values():
        for title, table in tables(record):
            section.blocks.append(TableBlock.of(table, title, text_columns=2))
    return section
