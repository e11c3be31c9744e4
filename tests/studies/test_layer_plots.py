"""The pictures of `halve layers`, read back from their axes."""

from __future__ import annotations

from typing import Any

from halve.measure.pictures import Painter, new_figure
from halve.studies.layer_plots import by_run, by_sublayer


def analysis(layers: int) -> dict[str, Any]:
    """A run costs its length, and a bit more the later it begins."""
    points = range(layers + 1)
    turns = {str(layer): {"last_token": 0.1 * layer} for layer in range(layers)}
    return {
        "last_token": [[abs(end - start) + 0.1 * start for end in points] for start in points],
        "best_first_layer": {str(count): 0 for count in range(1, layers)},
        "sublayers": {"attention": turns, "mlp": turns},
    }


def painted(paint: Painter) -> tuple[list[Any], list[str], list[str]]:
    """Lines, names in the legend, and texts inside the axes."""
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        paint(axes)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        return list(axes.get_lines()), names, [text.get_text() for text in axes.texts]


def test_a_line_for_every_length_and_a_dot_on_its_best() -> None:
    lines, names, texts = painted(by_run(analysis(3), mark=2))
    assert names == ["n = 1", "n = 2"] and texts == ["layers 0..1"]
    assert [list(line.get_ydata()) for line in lines] == [[1, 1.1, 1.2], [1], [2, 2.1], [2]]
    assert lines[2].get_linewidth() > lines[0].get_linewidth()


def test_deep_models_name_the_ends_and_what_is_marked() -> None:
    lines, names, texts = painted(by_run(analysis(32), mark=8))
    assert len(lines) == 2 * 31 and names == ["n = 1", "n = 8", "n = 31"] and texts == ["layers 0..7"]


def test_sublayers_by_layer() -> None:
    lines, names, _ = painted(by_sublayer(analysis(3)))
    assert names == ["attention", "mlp"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 2]] * 2 and list(lines[0].get_ydata())[2] == 0.2
