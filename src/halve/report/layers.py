"""What a page shows of single layers: the distances that `halve layers` measured, and the errors in a manifest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from halve.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# what a manifest says of a linear, the most telling first
MEASURES = {
    "held_out_output_error": "error of the output, held-out text",
    "output_error": "error of the output, calibration text",
    "weight_error": "error of the weight",
    "l1_share_removed": "share of the L1 norm removed",
}
_MOST_RUNS = 12  # lines in a plot of distances, the shortest runs first


def distance_plot(analysis: dict[str, Any]) -> str:
    """The angular distance of every run of n layers by its first layer; a dot on the best run of each n."""
    pairs, best = analysis["last_token"], analysis["best_first_layer"]
    count = len(pairs) - 1

    def paint(axes: Axes) -> None:
        import matplotlib

        colours = matplotlib.colormaps["turbo"]
        for n in range(1, min(count, _MOST_RUNS + 1)):
            starts = range(count - n + 1)
            line = [pairs[start][start + n] for start in starts]
            colour = colours(0.08 + 0.84 * (n - 1) / max(1, min(count - 2, _MOST_RUNS - 1)))
            axes.plot(starts, line, color=colour, label=f"n = {n}")
            first = best[str(n)]
            axes.plot([first], [line[first]], "o", color=colour)
        _whole(axes, "first layer of the run", "angular distance")
        plots.legend_above(axes)

    return plots.draw(paint, "angular distance of every run of layers; a dot on the best run of each length")


def sublayer_plot(analysis: dict[str, Any]) -> str:
    """How far each attention and each MLP turns the stream on its own."""
    series = {
        kind: {int(layer): turn["last_token"] for layer, turn in turns.items()}
        for kind, turns in analysis["sublayers"].items()
    }
    return plots.draw(
        plots.lines(series, x="layer", y="angular distance"), "angular distance of every sublayer, by layer"
    )


def _whole(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def error_series(step: dict[str, Any]) -> tuple[str, dict[str, dict[int, float]]] | None:
    """The most telling measure of a manifest's step, by role and layer; None when it measured nothing by layer."""
    for key, title in MEASURES.items():
        series: dict[str, dict[int, float]] = {}
        for row in step["linears"]:
            place = re.search(r"\.(\d+)\.", row["name"])
            if place and isinstance(row.get(key), int | float):
                series.setdefault(row["name"].rsplit(".", 1)[-1], {})[int(place[1])] = row[key]
        if series:
            return title, series
    return None


def error_plot(title: str, series: dict[str, dict[int, float]], described: str) -> str:
    """One line for each kind of linear over the layers, in per cent."""
    paint: Callable[[Axes], None] = plots.lines(series, x="layer", y=title, percent=True)
    return plots.draw(paint, described)
