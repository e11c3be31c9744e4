"""The picture of a search: every trial with its interval, the Pareto front, the limit, the winner and the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.measure.pictures import COLOURS, GREY, Painter, log_scale, new_figure, write_png
from halve.studies.search.figures import Judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Place = Callable[[dict[str, Any]], float]  # where a trial stands on the x axis


def by_objective(record: dict[str, Any]) -> Painter:
    """Quality against what a model costs, one of which the search limited and made the best of the other; from its record."""
    judged = Judged.of(record)
    scale, title = judged.cost.axis([judged.cost_of(row) for row in [*record["trials"], record["dense"]]])

    def place(trial: dict[str, Any]) -> float:
        return judged.cost_of(trial) / scale

    def paint(axes: Axes) -> None:
        dense, front, quality = record["dense"], record["pareto"], judged.quality
        unit, _ = quality.axis([])
        heights = [row[quality.key] / unit for row in front]
        axes.step(
            [place(row) for row in front], heights, where="post", color=COLOURS[1], label="Pareto front", zorder=3
        )
        if not _by_factors(record, judged):  # the dense model is 0 from itself, which has no place on such an axis
            axes.plot([place(dense)], [dense[quality.key] / unit], "^", color=GREY, label="dense")
        if not judged.limited.of_quality:
            limit = record["floor"][judged.limited.key] / scale
            axes.axvline(limit, color=COLOURS[4], linestyle=":", label="limit")
        _paint_trials(axes, record, place)
        axes.set(xlabel=title)

    return paint


def by_option(record: dict[str, Any], name: str) -> Painter:
    """Quality against one of the options that a search varied."""

    def paint(axes: Axes) -> None:
        _paint_trials(axes, record, lambda trial: trial["parameters"].get(name, math.nan))
        axes.set(xlabel=name)

    return paint


def _by_factors(record: dict[str, Any], judged: Judged) -> bool:
    """Whether the axis of quality has no zero: KL from one trial to the other differs by factors."""
    key = judged.quality.key
    return judged.quality.by_factors and all(row[key] > 0 for row in record["trials"])


def _paint_trials(axes: Axes, record: dict[str, Any], place: _Place) -> None:
    judged = Judged.of(record)
    quality = judged.quality
    for feasible, colour, label in ((True, COLOURS[0], "clears the floor"), (False, GREY, "does not")):
        some = [trial for trial in record["trials"] if bool(trial["feasible"]) is feasible]
        if some:
            _paint_points(axes, judged, some, place, fmt="o", color=colour, label=label, markersize=4, elinewidth=0.6)
    unit, title = quality.axis([])
    if judged.limited.of_quality:
        axes.axhline(record["floor"][quality.key] / unit, color=COLOURS[4], linestyle=":", label="floor")
    winner = record["winner"]
    if winner is not None:
        style: dict[str, Any] = {"color": COLOURS[2], "zorder": 4}
        axes.plot([place(winner)], [winner[quality.key] / unit], "*", markersize=11, label="winner", **style)
        _paint_points(axes, judged, [winner], place, "held_out_", fmt="D", capsize=3, elinewidth=1.6,
                      label="winner, held out", **style)  # fmt: skip
    axes.set(ylabel=title)
    if _by_factors(record, judged):
        log_scale(axes)
    axes.legend(loc="best")


def _paint_points(
    axes: Axes, judged: Judged, rows: Sequence[dict[str, Any]], place: _Place, prefix: str = "", **style: Any
) -> None:
    """Values with how far their intervals reach below and above, 0 where they have none."""
    quality = judged.quality
    unit, _ = quality.axis([])
    values = [row[prefix + quality.key] / unit for row in rows]
    below, above = [], []
    for row, value in zip(rows, values, strict=True):
        low, high = quality.ends(row, prefix)
        below.append(0.0 if low is None else max(0.0, value - low / unit))
        above.append(0.0 if high is None else max(0.0, high / unit - value))
    axes.errorbar([place(row) for row in rows], values, yerr=[below, above], **style)


def write_plot(record: dict[str, Any], path: Path) -> None:
    """Write the picture of a search record as PNG."""
    with new_figure((7, 4.4)) as figure:
        by_objective(record)(figure.subplots())
        figure.suptitle(f"{record['model']}: {', '.join(one['name'] for one in record['varied'])}")
        write_png(figure, path)
