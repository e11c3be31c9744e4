"""The Python names on the pages exist and take the arguments that are written there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [page for page in ("README.md", "CONTRIBUTING.md") if (PROJECT / page).is_file()]
PAGES += sorted(f"docs/{page.name}" for page in (PROJECT / "docs").glob("*.md") if page.stem not in ("LOG", "help"))
# a name of the package or of the tools in a code span, with or without its arguments
NAME = re.compile(r"`((?:halve|tools)(?:\.\w+)+)(\([^`]*\))?`")
FILES = ("json", "jsonl", "md")  # halve.json is a file


def resolve(name: str) -> Any:
    """What a dotted name names; fails where it names nothing."""
    first, *rest = name.split(".")
    value: Any = importlib.import_module(first)
    path = first
    for part in rest:
        path += f".{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    return value


def check_call(function: Any, arguments: str) -> None:
    """`arguments`, as in "(model, out, floor=..., ...)", fit the signature; "..." stands for any more."""
    open_end = re.compile(r"(?<=[,(])\s*\.\.\.\)$")
    call = ast.parse("f" + open_end.sub(")", arguments), mode="eval").body
    assert isinstance(call, ast.Call)
    signature = inspect.signature(function)
    signature.bind_partial(*call.args, **{str(keyword.arg): None for keyword in call.keywords})


def check(text: str) -> None:
    for name, arguments in NAME.findall(text):
        if name.rsplit(".", 1)[1] in FILES:
            continue
        value = resolve(name)
        if arguments and arguments != "(...)":
            check_call(value, arguments)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_a_page_is_there(page: str) -> None:
    check((PROJECT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "`halve.conversion`",
        "`halve.compression.plan.nothing(x)`",
        "`halve.prune_linear(layer, share=0.1)`",
        "`halve.write_page(1, 2, 3, 4)`",
    ],
)
def test_a_name_that_is_gone_is_found(text: str) -> None:
    with pytest.raises((ImportError, AttributeError, TypeError)):
        check(text)


def test_what_exists_passes() -> None:
    check("`halve.compress(model, out, steps, ...)`, `halve.json`, `tools.reader.export`, `halve.model.decoder.Model`")


def test_the_table_of_steps_has_every_step() -> None:
    from halve.compression.methods import METHODS

    section = (PROJECT / "README.md").read_text().split("### Steps", 1)[1].split("### ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)) == sorted(METHODS)
