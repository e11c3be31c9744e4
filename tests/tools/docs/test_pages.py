"""The map, the help and the step table: made from the package, whole, and found stale."""

from __future__ import annotations

from pathlib import Path

import pytest

import halve
from halve.cli.app import app
from halve.compression.methods import METHODS
from halve.errors import DataError
from tools.docs import help as help_pages
from tools.docs import layout, pages
from tools.docs.layers import LAYERS


def test_the_map_names_every_room_top_layer_first() -> None:
    rows = layout.make_map("", pages.ROOT).splitlines()[2:]
    rooms = [row.split("[")[1].split("]")[0] for row in rows]
    assert {room.split("/")[0].removesuffix(".py") for room in rooms} == set().union(*LAYERS)
    assert rooms[0] == "cli/" and rooms[-1] == "escapes.py"
    assert "compression/methods/" in rooms
    levels = [int(row.split("|")[1]) for row in rows]
    assert levels == sorted(levels, reverse=True)


def test_a_room_that_says_nothing_is_refused(tmp_path: Path) -> None:
    room = tmp_path / "room.py"
    room.write_text("x = 1\n")
    with pytest.raises(DataError, match="no docstring"):
        layout.first_line(room)
    with pytest.raises(DataError, match="not there"):
        layout.first_line(tmp_path / "gone.py")


def test_every_command_is_on_the_help_page() -> None:
    text = help_pages.make_help("", pages.ROOT)
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"## halve {name}\n" in text and f"Usage: halve {name}" in text
    assert "\x1b" not in text and "─" not in text
    assert text == help_pages.make_help("", pages.ROOT)


def test_every_step_is_in_the_table_with_its_defaults() -> None:
    text = help_pages.make_steps("", pages.ROOT)
    assert [row.split("`")[1] for row in text.splitlines()[2:]] == list(METHODS)
    assert "`bits=4` `group_size=128`" in text


def test_a_page_that_lags_behind_is_stale(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    (tmp_path / "src").mkdir()
    (tmp_path / "src/halve").symlink_to(Path(halve.__file__).parent)
    page.write_text("<!-- map -->\nold\n<!-- end map -->\n<!-- steps -->\n<!-- end steps -->\n")
    assert pages.update(tmp_path, check=True) == [page]
    assert pages.update(tmp_path, check=False) == [page]
    assert pages.update(tmp_path, check=True) == []
    assert "[cli/](src/halve/cli/)" in page.read_text() and "| `gptq` |" in page.read_text()


@pytest.mark.parametrize("kind", ["map", "help", "steps"])
def test_options_that_do_nothing_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"<!-- {kind} wide -->\n<!-- end {kind} -->\n")
    with pytest.raises(DataError, match='"wide" is too much'):
        pages.update(tmp_path, check=True)
