"""The sections about studies: a search for the smallest model above a floor, and a published table made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from halve.measure.records import Record
from halve.measure.units import byte_unit, show_accuracy, show_bytes, show_difference, show_percent
from halve.report import plots
from halve.report.blocks import FactsBlock, Plot, PlotsBlock, Section, TableBlock
from halve.report.contents import Contents
from halve.report.models import step_text
from halve.studies.system1.tables import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES = {"bytes": "weights", "peak_memory": "peak memory", "decode_ms": "decode (ms a token)"}
_MOST_VARIED = 3  # options with a plot of their own
_PASS, _FAIL, _FRONT, _WINNER = plots.COLOURS[0], "#9a9a9a", plots.COLOURS[1], plots.COLOURS[2]


def searches(found: Contents) -> Section:
    """Winner, plot, front and trials of every search."""
    section = Section("search", "Search")
    for place, record in found.searches.items():
        title = str(place.parent) if len(found.searches) > 1 else ""
        section.blocks.append(FactsBlock(_facts(record), title))
        section.blocks.append(_plots(record))
        front = record.get("pareto") or []
        if len(front) > 1:
            section.blocks.append(_trial_table(record, front, "Pareto front"))
        notes = list(record.get("notes", []))
        section.blocks.append(_trial_table(record, record["trials"], f"All {len(record['trials'])} trials", notes))
    return section


def _facts(record: Record) -> list[tuple[str, str]]:
    floor = record["floor"]
    asked = [f"{one['name']} from {one['low']:g} to {one['high']:g}" for one in record["varied"]]
    data = [
        f"{record[key]['questions']} of {record[key]['name']}"
        for key in ("search_data", "held_out_data")
        if record.get(key)
    ]
    protocol = ", ".join(str(record[key]) for key in ("task", "protocol", "template") if record.get(key))
    about = [
        ("model", record["model"]),
        ("recipe", ", then ".join(step_text(step) for step in record["recipe"])),
        ("varied", "; ".join(asked)),
        (
            "floor",
            show_percent(floor["accuracy"]) + (", by the interval's lower end" * bool(floor.get("lower_bound"))),
        ),
        ("least", OBJECTIVES.get(record["objective"], record["objective"])),
        ("questions", " to search, ".join(data) + (" to confirm" if len(data) > 1 else "") + f" ({protocol})"),
    ]
    return [*_winner(record.get("winner")), *about]


def _winner(winner: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The winner first: it is what the search was for."""
    if winner is None:
        return [("winner", "none: no trial clears the floor")]
    share, interval = winner.get("bytes_share"), winner.get("accuracy_ci95") or (None, None)
    facts = [
        ("winner", _parameters(winner)),
        ("weights", show_bytes(winner["bytes"]) + ("" if share is None else f", {show_percent(share, 0)} of dense")),
        ("accuracy, search", show_accuracy(winner["accuracy"], *interval)),
    ]
    if winner.get("held_out_accuracy") is not None:
        interval = winner.get("held_out_accuracy_ci95") or (None, None)
        verdict = {True: ", confirmed", False: ", NOT confirmed"}.get(winner.get("confirmed", ""), "")
        facts.append(("accuracy, held out", show_accuracy(winner["held_out_accuracy"], *interval) + verdict))
    if winner.get("held_out_difference_to_dense") is not None:
        test = winner["held_out_difference_to_dense"], winner["held_out_difference_p_value"]
        facts.append(("to the dense model", show_difference(*test)))
    return facts


def _parameters(trial: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in trial["parameters"].items())


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _trial_table(record: Record, trials: Sequence[dict[str, Any]], title: str, notes: Sequence[str] = ()) -> TableBlock:
    names = list(dict.fromkeys(name for trial in trials for name in trial["parameters"]))
    objective = record["objective"]
    extra = [] if objective == "bytes" else [str(OBJECTIVES.get(objective, objective))]
    rows = []
    for trial in sorted(trials, key=lambda t: t["objective"]):
        values = [_value(trial["parameters"].get(name, "-")) for name in names]
        accuracy = show_accuracy(trial["accuracy"], *(trial.get("accuracy_ci95") or (None, None)))
        measured = [show_objective(objective, trial["objective"])] if extra else []
        rows.append([*values, accuracy, "yes" if trial["feasible"] else "no", show_bytes(trial["bytes"]), *measured])
    return TableBlock([*names, "accuracy", "clears the floor", "weights", *extra], rows, title, notes, text_columns=0)


def show_objective(objective: str, value: float) -> str:
    """An objective's value with its unit."""
    return f"{value:.2f} ms" if objective == "decode_ms" else show_bytes(value)


Place = Callable[[dict[str, Any]], float]  # where a trial stands on the x axis


def _plots(record: Record) -> PlotsBlock:
    """Accuracy against what is minimised, with the front, and against each varied option."""
    objective = record["objective"]
    scale, unit = (1.0, "") if objective == "decode_ms" else byte_unit(max(t["objective"] for t in record["trials"]))
    title = OBJECTIVES.get(objective, objective)

    def against_objective(axes: Axes) -> None:
        _paint(axes, record, lambda trial: trial["objective"] / scale)
        axes.set(xlabel=f"{title} ({unit})" if unit else title)

    caption = f"{record['model']}: every trial, the Pareto front, the floor and the winner"
    pictures = [Plot(plots.draw(against_objective, caption), caption)]
    for one in record["varied"][:_MOST_VARIED]:
        name = one["name"]

        def against_option(axes: Axes, name: str = name) -> None:
            _paint(axes, record, lambda trial: trial["parameters"].get(name, math.nan), front=False)
            axes.set(xlabel=name)

        pictures.append(Plot(plots.draw(against_option, f"accuracy by {name}"), f"accuracy by {name}"))
    return PlotsBlock(pictures)


def _paint(axes: Axes, record: Record, place: Place, front: bool = True) -> None:
    winner, dense = record.get("winner"), record.get("dense")
    for feasible, colour, label in ((True, _PASS, "clears the floor"), (False, _FAIL, "does not")):
        some = [trial for trial in record["trials"] if bool(trial["feasible"]) is feasible]
        if some:
            _points(axes, some, place, color=colour, label=label, markersize=4)
    best = record.get("pareto") or []
    if front and len(best) > 1:
        axes.step([place(t) for t in best], [100 * t["accuracy"] for t in best], where="post", color=_FRONT,
                  label="Pareto front", zorder=3)  # fmt: skip
    if front and dense:
        axes.plot([place(dense)], [100 * dense["accuracy"]], "^", color="#8a8a8a", label="dense")
    axes.axhline(100 * record["floor"]["accuracy"], color=plots.COLOURS[4], linestyle=":", label="floor")
    if winner:
        held_out = winner.get("held_out_accuracy") is not None
        label = "winner, held out" if held_out else "winner"
        key = "held_out_accuracy" if held_out else "accuracy"
        style = {"fmt": "D", "capsize": 3, "elinewidth": 1.6, "zorder": 4}
        _points(axes, [winner], place, key, color=_WINNER, label=label, **style)
    axes.set(ylabel="accuracy (%)")
    axes.legend(loc="best", fontsize=8)


def _points(axes: Axes, some: Sequence[dict[str, Any]], place: Place, key: str = "accuracy", **style: Any) -> None:
    """Trials with their intervals."""
    ends = [row.get(f"{key}_ci95") or (row[key], row[key]) for row in some]
    low = [100 * (row[key] - end[0]) for row, end in zip(some, ends, strict=True)]
    high = [100 * (end[1] - row[key]) for row, end in zip(some, ends, strict=True)]
    x, y = [place(row) for row in some], [100 * row[key] for row in some]
    axes.errorbar(x, y, yerr=[low, high], **({"fmt": "o", "elinewidth": 0.6} | style))


def reproductions(found: Contents) -> Section:
    """Published tables beside what was measured here."""
    section = Section("reproduction", "Published tables, made again")
    for record in found.reproductions.values():
        for title, table in tables(record):
            section.blocks.append(TableBlock.of(table, title, text_columns=2))
    return section
