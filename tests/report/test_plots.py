"""Plots of a page: factors on a log axis, many steps in one picture, and names that are anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from halve.measure.pictures import lines, new_figure, write_png
from halve.report.layers import error_plot
from halve.report.plots import Mark, draw, draw_multiples, scatter
from tests.test_escapes import odd_texts

from .test_page import Outline


def ticks(values: list[float], log: bool) -> list[str]:
    """The numbers on the y axis."""
    marks = [Mark(f"m{n}", float(n), value) for n, value in enumerate(values)]
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        scatter(marks, x="x", y="perplexity", log=log)(axes)
        figure.draw_without_rendering()
        low, high = axes.get_ylim()
        shown = [(text.get_position()[1], text.get_text()) for text in axes.get_yticklabels()]
        return [text for place, text in shown if low <= place <= high and text]


@pytest.mark.parametrize("values", [[3.03, 3.05, 3.06], [3.0, 4.7, 681.5], [4.0, 9.0, 30.0], [5.0, 5.0], [2.0, 1e12]])
def test_factors_have_ticks_in_plain_numbers(values: list[float]) -> None:
    shown = ticks(values, log=True)
    assert len(shown) >= 2 and len(set(shown)) == len(shown)
    assert all(re.fullmatch(r"[\d.]+(e\+\d+)?", text) for text in shown), shown


def test_an_outlier_does_not_flatten_the_others() -> None:
    marks = [Mark(f"m{n}", float(n), value) for n, value in enumerate((3.0, 4.7, 8.9, 681.5))]
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        scatter(marks, x="x", y="perplexity", log=True)(axes)
        figure.draw_without_rendering()
        heights = [axes.transData.transform((m.x, m.y))[1] for m in marks]
        assert heights[2] - heights[0] > 0.15 * (heights[3] - heights[0])


def test_steps_share_one_picture_its_limits_and_one_legend() -> None:
    panels = [{"q_proj": {0: 0.01, 1: 0.02}, "up_proj": {0: 0.03}}, {"up_proj": {0: 0.5, 1: 0.4}}, {"q_proj": {0: 0.1}}]
    text = error_plot("error of the weight", panels, "three steps")
    words = [word.strip() for word in Outline(text).texts if word.strip()]
    assert [words.count(name) for name in ("q_proj", "up_proj", "2", "3")] == [1, 1, 1, 1]
    assert words.count("error of the weight") == 1 and "40%" in " ".join(words)


def test_the_highest_line_of_all_panels_is_inside() -> None:
    limits = []

    def spy(high: float):
        paint = lines({"a": {0: 0.1, 1: high}}, x="", y="", among=["a"])

        def painted(axes) -> None:
            paint(axes)
            limits.append(axes)

        return painted

    draw_multiples([spy(0.1), spy(0.9), spy(0.2)], "x", "y", "d")
    assert all(axes.get_ylim()[0] == 0 and 0.9 < axes.get_ylim()[1] < 1.1 for axes in limits)


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    texts = [*odd_texts()[::12], "long " * 2000]
    shown = draw(lines({text: {0: 1.0} for text in texts}, x="x", y="y"), "".join(texts), (40, 40))
    assert Outline(shown).open == [] and all(c.isprintable() or c == "\n" for c in shown)
    shown = draw(scatter([Mark(text, 1.0, 2.0) for text in texts[-1:]], x="x", y="y"), texts[-1])
    assert [len(text.strip()) for text in Outline(shown).texts if text.strip().startswith("long")] == [40]
    with new_figure((4, 3)) as figure:
        figure.suptitle("".join(texts[:20]))
        write_png(figure, tmp_path / "a.png")
