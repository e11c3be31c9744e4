"""Plots as SVG text that stands inside a page: no pixels, no files, colours that follow the page's light or dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halve.escapes import plain
from halve.measure.pictures import COLOURS, GREY, LONGEST_NAME, Painter, log_scale, new_figure, plain_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stand-ins that become the page's own colours
_INK, _RULE = "#010203", "#010204"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "halve",
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _RULE,
}
SIZE = (4.3, 3.1)  # inches: narrow enough to be read on a phone
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Mark:
    """One model in a plot: y with its interval, labelled by name. `kind` picks colour and legend entry."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    kind: int = 0


def draw(paint: Painter, description: str, size: tuple[float, float] = SIZE) -> str:
    """The SVG of one pair of axes that `paint` has painted; `description` is what a screen reader says."""
    with new_figure(size, _STYLE) as figure:
        paint(figure.subplots())
        return _svg(figure, description)


def draw_multiples(painters: Sequence[Painter], x: str, y: str, description: str) -> str:
    """The SVG of several pairs of axes with the same limits and one legend, numbered from 1; a single one is large."""
    columns = 1 if len(painters) == 1 else 2
    rows = -(-len(painters) // columns)
    with new_figure((SIZE[0], 0.9 + (2.2 if columns == 1 else 1.2 * rows)), _STYLE) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for number, (axes, paint) in enumerate(zip(grid, painters, strict=False), 1):
            paint(axes)
            if columns > 1:
                axes.set_title(str(number), loc="left", pad=2)
        for axes in grid[len(painters) :]:
            axes.set_axis_off()
        entries = {}
        painted = grid[: len(painters)]
        # painting one of them has ended the common scaling
        painted[0].set_ylim(0, 1.05 * max(axes.dataLim.ymax for axes in painted) or None)
        for axes in painted[-columns:]:
            axes.tick_params(labelbottom=True)
        for axes in painted:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        figure.supxlabel(x, fontsize="medium")
        figure.supylabel(y, fontsize="medium")
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=4, handlelength=1.4)
        return _svg(figure, description)


def _svg(figure: Figure, description: str) -> str:
    from html import escape

    plain_texts(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)  # HTML knows what an svg is
    text = text.replace("xlink:href=", "href=")
    prefix = f"p{next(_numbers)}-"  # several plots share a page
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = text.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    text = re.sub(r"font: (\d+\.?\d*)px [^;\"]*", r"font-size: \1px", text)  # the page's own fonts
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(plain(description))}" ', 1)


def scatter(
    marks: Sequence[Mark], *, x: str, y: str, kinds: Mapping[int, str] | None = None, line: float | None = None,
    line_label: str = "", log: bool = False,
) -> Painter:  # fmt: skip
    """Points with intervals and names. `kinds`: legend text of each kind; `line`: a dotted level, such as chance; `log`: y
    by factors, where all are above 0."""

    def paint(axes: Axes) -> None:
        for kind in dict.fromkeys(mark.kind for mark in marks):
            some = [mark for mark in marks if mark.kind == kind]
            spans: Any = [
                [0.0 if m.low is None else max(0.0, m.y - m.low) for m in some],
                [0.0 if m.high is None else max(0.0, m.high - m.y) for m in some],
            ]
            label = (kinds or {}).get(kind)
            axes.errorbar(
                [m.x for m in some], [m.y for m in some], yerr=spans, fmt="o", color=COLOURS[kind % len(COLOURS)],
                elinewidth=1, capsize=2, label=label,
            )  # fmt: skip
        if line is not None:
            axes.axhline(line, color=GREY, linestyle=":", label=line_label or None)
        axes.margins(0.14)
        axes.set(xlabel=x, ylabel=y)
        if log and all(mark.y > 0 for mark in marks):
            log_scale(axes)
        if kinds or line_label:
            axes.legend(loc="best")
        _label(axes, marks)

    return paint


def _label(axes: Axes, marks: Sequence[Mark]) -> None:
    """Names beside their points, where the names before leave room; a name that finds none is left out."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where points are
    width, height = 4.9, 10.0  # of a letter, in points
    taken: list[tuple[float, float, float, float]] = []
    scale = 72 / figure.dpi
    places = [axes.transData.transform((m.x, m.y)) * scale for m in marks]
    taken += [(px - 3, py - 3, px + 3, py + 3) for px, py in places]
    left, bottom, right, top = (end * scale for end in axes.get_window_extent().extents)
    for mark, (px, py) in zip(marks, places, strict=True):
        name = plain(mark.name, LONGEST_NAME)
        size = width * len(name)
        for dx, dy, side in _OFFSETS:
            x0 = px + dx - {"left": 0.0, "center": size / 2, "right": size}[side]
            box = (x0, py + dy, x0 + size, py + dy + height)
            inside = x0 >= left - 4 and box[2] <= right + 4 and box[1] >= bottom and box[3] <= top + 4
            if not inside or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                name, (mark.x, mark.y), (dx, dy), textcoords="offset points", ha=side, va="bottom", fontsize=8
            )
            break


_OFFSETS = (
    *((6, -4, "left"), (-6, -4, "right"), (6, 5, "left"), (-6, 5, "right"), (6, -14, "left"), (-6, -14, "right")),
    *((0, 8, "center"), (0, -18, "center"), (6, 16, "left"), (-6, 16, "right"), (6, -25, "left"), (-6, -25, "right")),
)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
