"""Pictures: intervals of records by hand, and files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from halve.errors import OutputError
from halve.measure.pictures import check_picture_path, lines, new_figure, with_interval, write_png


def test_intervals_are_lengths_in_per_cent() -> None:
    rows = [{"accuracy": 0.5, "accuracy_ci95": [0.25, 0.625]}, {"accuracy": 0.75, "accuracy_ci95": None}]
    assert with_interval(rows) == ([50.0, 75.0], [[25.0, 0.0], [12.5, 0.0]])
    assert with_interval([{"held_out": 0.5, "held_out_ci95": [0.5, 1.0]}], "held_out") == ([50.0], [[0.0], [50.0]])


def test_a_picture_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_figure((3, 2)) as figure:
        lines({"mlp": {0: 0.5, 1: 0.25}}, x="layer", y="error")(figure.subplots())
        write_png(figure, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

        def full(path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(figure, "savefig", full)
        with pytest.raises(OutputError, match=r"b\.png cannot be written \(No space left"):
            write_png(figure, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(OutputError, match="No such file"), new_figure((3, 2)) as figure:
        write_png(figure, tmp_path / "nowhere" / "a.png")


def test_lines_begin_at_zero_over_whole_numbers() -> None:
    with new_figure((3, 2)) as figure:
        axes = figure.subplots()
        lines({"attention": {0: 0.5, 1: 0.25}, "mlp": {1: 0.1}}, x="layer", y="error", percent=True)(axes)
        assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0.5, 0.25], [0.1]]
        assert axes.get_ylim()[0] == 0 and all(tick == int(tick) for tick in axes.get_xticks())
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attention", "mlp"]


def test_only_a_picture_of_halves_is_replaced(tmp_path: Path) -> None:
    with new_figure((2, 1)) as figure:
        write_png(figure, tmp_path / "ours.png")
        figure.savefig(tmp_path / "theirs.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("ours.png", "new.png"):
        assert check_picture_path(tmp_path / name) == tmp_path / name
    for name in ("theirs.png", "text.png"):
        with pytest.raises(OutputError, match=f"{name} exists and is not a picture that halve wrote"):
            check_picture_path(tmp_path / name)
