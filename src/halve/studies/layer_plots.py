"""The pictures of `halve layers`: how far every run of layers, and every sublayer alone, turns the residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.measure.pictures import Painter, from_zero_over_whole_numbers, legend_above, lines, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMED = 12  # lines that a legend has room for


def by_run(analysis: dict[str, Any], mark: int | None = None) -> Painter:
    """The distance of every run of n layers by its first layer, a dot on the best run of each n; `mark`: the n that
    stands out. `analysis` is what layers.json holds."""
    distances, best = analysis["last_token"], analysis["best_first_layer"]
    layers = len(distances) - 1

    def paint(axes: Axes) -> None:
        import matplotlib

        colours = matplotlib.colormaps["turbo"]
        for count in range(1, layers):
            bold = count == mark
            colour = colours(0.08 + 0.84 * (count - 1) / max(1, layers - 2))  # its ends are too dark on black
            line = [distances[first][first + count] for first in range(layers - count + 1)]
            named = bold or layers <= _MOST_NAMED + 1 or count in (1, layers - 1)
            axes.plot(line, color=colour, linewidth=3 if bold else 1.4, label=f"n = {count}" if named else None)
            start = best[str(count)]
            axes.plot([start], [line[start]], "o", color=colour)
            if bold:
                name = f"layers {start}..{start + count - 1}"
                axes.annotate(name, (start, line[start]), (0, -16), textcoords="offset points", ha="center")
        axes.set(xlabel="first layer of the run", ylabel="angular distance")
        from_zero_over_whole_numbers(axes)
        legend_above(axes)

    return paint


def by_sublayer(analysis: dict[str, Any]) -> Painter:
    """How far each attention and each MLP turns the stream on its own."""
    series = {
        kind: {int(layer): turn["last_token"] for layer, turn in turns.items()}
        for kind, turns in analysis["sublayers"].items()
    }
    return lines(series, x="layer", y="angular distance")


def write_plots(analysis: dict[str, Any], path: Path, mark: int | None) -> None:
    """Write both pictures as one PNG. Raises OutputError."""
    with new_figure((11, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        by_run(analysis, mark)(left)
        by_sublayer(analysis)(right)
        name = Path(analysis["model"]).name
        figure.suptitle(f"{name}: runs of n layers (a dot on the best), and each sublayer alone (last token)")
        write_png(figure, path)
