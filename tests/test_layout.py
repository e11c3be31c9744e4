"""The floor plan: a room imports only itself and lower layers, and no module grows past reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import halve
from tools.docs.layers import LAYERS

PACKAGE = Path(halve.__file__).parent
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ENTRIES = {"__init__", "__main__"}  # the public names and `python -m halve`: they see everything
MODULE_LINES, FUNCTION_LINES = 400, 55


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from halve import model` imports the room; of another module the names do not matter
            names = [f"halve.{alias.name}" for alias in node.names] if node.module == "halve" else [str(node.module)]
            yield from names


def broken(file: str, source: str) -> list[str]:
    """What a file of the package, named from its root, imports against the rule."""
    room, found = Path(file).parts[0].removesuffix(".py"), []
    for module in imports(ast.parse(source)):
        parts = module.split(".")
        if parts[0] != "halve":
            continue
        if len(parts) == 1:
            found.append(f"{file}: imports the package itself")
            continue
        other = parts[1]
        if other not in LEVEL:
            found.append(f"{file}: imports {module}, which is no room")
        elif other != room and LEVEL[other] >= LEVEL[room]:
            found.append(f"{file}: {room} may not import {other}")
    return found


def files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_every_file_is_in_a_room() -> None:
    rooms = {path.parts[0].removesuffix(".py") for path in files()}
    assert rooms == set(LEVEL) | ENTRIES


@pytest.mark.parametrize("file", [str(f) for f in files() if f.stem not in ENTRIES or len(f.parts) > 1])
def test_imports_go_downwards(file: str) -> None:
    assert broken(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/linear.py", "from halve.checkpoint.reader import load_model"),
        ("model/linear.py", "def f():\n    import halve.cli.app"),
        ("measure/table.py", "from halve.compression import plan"),
        ("measure/table.py", "if TYPE_CHECKING:\n    from halve import compression"),
        ("files.py", "from halve import compress"),
        ("errors.py", "import halve"),
        ("errors.py", "from halve.progress import track"),
    ],
)
def test_the_rule_finds_what_breaks_it(file: str, source: str) -> None:
    assert len(broken(file, source)) == 1


def test_a_room_may_import_itself_and_what_lies_below() -> None:
    source = (
        "import torch\nfrom halve.model import merge\nfrom halve import kernels\nfrom halve.errors import HalveError"
    )
    assert broken("model/linear.py", source) == []


def too_long(file: Path) -> Iterator[str]:
    source = (PACKAGE / file).read_text()
    if (lines := len(source.splitlines())) > MODULE_LINES:
        yield f"{file}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            head = node.body[0].lineno  # a signature and its docstring are not what one has to follow
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                head = node.body[1].lineno
            if (lines := node.end_lineno - head + 1) > FUNCTION_LINES:
                yield f"{file}: {node.name} has {lines} lines"


def test_no_file_grows_past_reading() -> None:
    """Kernels may: they are read beside the machine code."""
    assert [found for file in files() if file.parts[0] != "kernels" for found in too_long(file)] == []


def public_classes() -> Iterator[tuple[str, str]]:
    """(name, file) of every class of the package that other modules may use."""
    for file in files():
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, str(file)


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for name, file in public_classes():
        places.setdefault(name, []).append(file)
    assert {name: homes for name, homes in places.items() if len(homes) > 1} == {}
