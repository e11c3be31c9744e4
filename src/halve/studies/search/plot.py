"""The picture of a search: every trial with its interval, the Pareto front, the floor, the winner and the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.measure.pictures import COLOURS, GREY, Painter, new_figure, with_interval, write_png
from halve.measure.units import byte_unit
from halve.studies.search.options import OBJECTIVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Place = Callable[[dict[str, Any]], float]  # where a trial stands on the x axis


def by_objective(record: dict[str, Any]) -> Painter:
    """Accuracy against what a search minimises, from its record."""
    objective = record["objective"]
    scale, unit = 1.0, ""
    if objective != "ms":
        scale, unit = byte_unit(max(row["objective"] for row in [*record["trials"], record["dense"]]))

    def place(trial: dict[str, Any]) -> float:
        return trial["objective"] / scale

    def paint(axes: Axes) -> None:
        dense, front = record["dense"], record["pareto"]
        accuracy, _ = with_interval(front)
        axes.step(
            [place(row) for row in front], accuracy, where="post", color=COLOURS[1], label="Pareto front", zorder=3
        )
        axes.plot([place(dense)], [100 * dense["accuracy"]], "^", color=GREY, label="dense")
        _paint_trials(axes, record, place)
        title = OBJECTIVES.get(objective, objective)
        axes.set(xlabel=f"{title} ({unit})" if unit else title)

    return paint


def by_option(record: dict[str, Any], name: str) -> Painter:
    """Accuracy against one of the options that a search varied."""

    def paint(axes: Axes) -> None:
        _paint_trials(axes, record, lambda trial: trial["parameters"].get(name, math.nan))
        axes.set(xlabel=name)

    return paint


def _paint_trials(axes: Axes, record: dict[str, Any], place: _Place) -> None:
    for feasible, colour, label in ((True, COLOURS[0], "clears the floor"), (False, GREY, "does not")):
        some = [trial for trial in record["trials"] if bool(trial["feasible"]) is feasible]
        if some:
            _paint_points(axes, some, place, fmt="o", color=colour, label=label, markersize=4, elinewidth=0.6)
    axes.axhline(100 * record["floor"]["accuracy"], color=COLOURS[4], linestyle=":", label="floor")
    winner = record["winner"]
    if winner is not None:
        style: dict[str, Any] = {"color": COLOURS[2], "zorder": 4}
        axes.plot([place(winner)], [100 * winner["accuracy"]], "*", markersize=11, label="winner", **style)
        _paint_points(axes, [winner], place, "held_out_accuracy", fmt="D", capsize=3, elinewidth=1.6,
                      label="winner, held out", **style)  # fmt: skip
    axes.set(ylabel="accuracy (%)")
    axes.legend(loc="best")


def _paint_points(
    axes: Axes, rows: Sequence[dict[str, Any]], place: _Place, key: str = "accuracy", **style: Any
) -> None:
    accuracy, interval = with_interval(rows, key)
    axes.errorbar([place(row) for row in rows], accuracy, yerr=interval, **style)


def write_plot(record: dict[str, Any], path: Path) -> None:
    """Write the picture of a search record as PNG."""
    with new_figure((7, 4.4)) as figure:
        by_objective(record)(figure.subplots())
        figure.suptitle(f"{record['model']}: {', '.join(one['name'] for one in record['varied'])}")
        write_png(figure, path)
