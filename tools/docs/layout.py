"""The map of the package: every room with the first line of its docstring, the top layer first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from halve.errors import DataError
from tools.docs.layers import LAYERS


def make_map(request: str, root: Path) -> str:
    """The Markdown table of all rooms; DataError for a room that is not there or says nothing about itself."""
    if request:
        raise DataError(f'"{request}" is too much: the map takes no options')
    package = root / "src/halve"
    rows = ["| layer | room | what it is |\n", "| ---: | --- | --- |\n"]
    for level, rooms in reversed(list(enumerate(LAYERS, 1))):
        for room in sorted(rooms):
            for path in _parts(package / room):
                name = path.relative_to(root).as_posix() + ("/" if path.is_dir() else "")
                short = path.relative_to(package).as_posix() + ("/" if path.is_dir() else "")
                rows.append(f"| {level} | [{short}]({name}) | {first_line(path)} |\n")
    return "".join(rows)


def _parts(room: Path) -> Iterator[Path]:
    """A room's file or folder, then the packages inside it."""
    yield room if room.is_dir() else room.with_suffix(".py")
    yield from sorted(init.parent for init in room.glob("**/__init__.py") if init.parent != room)


def first_line(path: Path) -> str:
    """The first line of the docstring of a module or package."""
    file = path / "__init__.py" if path.is_dir() else path
    try:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist: tools/docs/layers.py names a room that is not there") from error
    if not text:
        raise DataError(f"{file} has no docstring: say in its first line what it is")
    return text.splitlines()[0]
