"""How every picture looks, what several of them paint, and pictures as PNG files.

A picture is painted on axes by a function that stands beside what it is about, so that a PNG and the SVG of a page
(`report/plots.py`) show the same.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.escapes import plain
from halve.files import check_output_path, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3f7fc4", "#d9772f", "#3d9b6d", "#9a6cc4", "#cf4d64", "#8a8f3a", "#2f9aa8", "#a06a4a")  # on white and black
GREY = "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # names of models are text
    "axes.titlesize": 9,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "grid.color": "#d9dee5",
    "grid.linewidth": 0.6,
    "axes.grid": True,
}
Painter = Callable[["Axes"], None]
_LONGEST_TEXT, LONGEST_NAME = 200, 40  # characters: of a title, and of one of many names
_MARK = b"Software\0halve"  # in the head of every PNG that halve writes


@contextmanager
def new_figure(size: tuple[float, float], style: Mapping[Any, Any] | None = None) -> Iterator[Figure]:
    """A figure of so many inches in the common style and `style` besides, to be painted and saved inside the context."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with matplotlib.rc_context(_STYLE | dict(style or {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name may be in any script
        yield Figure(figsize=size, layout="constrained")


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """Find out before any work whether a PNG can be written at `path`, where a PNG of halve's alone is replaced."""
    return check_output_path(path, "a picture", lambda there: _MARK in there.read_bytes()[:1024])


def write_png(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all. Raises OutputError."""
    plain_texts(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": "halve"})


def plain_texts(figure: Figure) -> None:
    """Names out of files become text that can be drawn."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(plain(text.get_text(), _LONGEST_TEXT))


def with_interval(rows: Sequence[Mapping[str, Any]], key: str = "accuracy") -> tuple[list[float], list[list[float]]]:
    """`key` of every row in per cent, and how far its 95 % interval reaches below and above, 0 where it has none."""
    ends = [row.get(f"{key}_ci95") or (row[key], row[key]) for row in rows]
    low = [max(0.0, 100 * (row[key] - end[0])) for row, end in zip(rows, ends, strict=True)]
    high = [max(0.0, 100 * (end[1] - row[key])) for row, end in zip(rows, ends, strict=True)]
    return [100 * row[key] for row in rows], [low, high]


def lines(
    series: Mapping[str, Mapping[int, float]],
    *,
    x: str,
    y: str,
    percent: bool = False,
    among: Sequence[str] | None = None,
) -> Painter:
    """Lines over whole numbers, such as layers. `among`: the names in all panels of a figure, which give the colours; the
    legend is the figure's then."""

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import PercentFormatter

        for name, points in series.items():
            colour = None if among is None else COLOURS[among.index(name) % len(COLOURS)]
            axes.plot(
                list(points),
                list(points.values()),
                marker="o",
                markersize=3,
                label=plain(name, LONGEST_NAME),
                color=colour,
            )
        axes.set(xlabel=x, ylabel=y)
        from_zero_over_whole_numbers(axes)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        if among is None:
            legend_above(axes)

    return paint


def from_zero_over_whole_numbers(axes: Axes) -> None:
    """y begins at 0, ticks of x are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_scale(axes: Axes) -> None:
    """y by factors, its ticks written as plain numbers: for figures of which a broken model's is many times the others'."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)) if high / low > 8 else MaxNLocator(5)
    axes.yaxis.set_major_locator(steps)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 4) -> None:
    """The legend outside the axes, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns, handlelength=1.4, columnspacing=1.2
    )
