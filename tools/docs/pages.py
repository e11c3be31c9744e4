"""What stands between two comments of README.md and docs/*.md is made: tables, the map of the package, help.

<!-- KIND how it is made -->
<!-- end KIND -->
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from halve.errors import DataError, HalveError
from tools.docs.help import make_help, make_refused, make_steps
from tools.docs.layout import make_map
from tools.docs.tables import make_table

ROOT = Path(__file__).resolve().parents[2]
# what makes the text of a block, from its request and the project's folder
MAKERS: dict[str, Callable[[str, Path], str]] = {
    "table": make_table,
    "map": make_map,
    "help": make_help,
    "steps": make_steps,
    "refused": make_refused,
}
OPENING = re.compile(rf"^<!-- (?P<kind>{'|'.join(MAKERS)})\b(?P<request>.*?)-->[ \t]*\n", re.MULTILINE)


def render(text: str, root: Path, source: str) -> str:
    """`text` with the inside of every comment pair made anew; DataError for a malformed request."""
    done: list[str] = []
    position = 0
    while opening := OPENING.search(text, position):
        kind = opening["kind"]
        line = text.count("\n", 0, opening.start()) + 1
        closing = f"<!-- end {kind} -->"
        end = text.find(closing, opening.end())
        following = OPENING.search(text, opening.end())
        if end < 0 or (following and following.start() < end):
            raise DataError(f"{source}, line {line}: the {kind} has no {closing}: add it")
        try:
            made = MAKERS[kind](opening["request"].strip(), root)
        except HalveError as error:
            raise DataError(f"{source}, line {line}: {error}") from error
        done += [text[position : opening.end()], made]
        position = end
    return "".join([*done, text[position:]])


def pages(root: Path) -> list[Path]:
    """The pages of the project."""
    names = ("README.md", "CONTRIBUTING.md")
    return [path for path in [*(root / n for n in names), *sorted((root / "docs").glob("*.md"))] if path.is_file()]


def update(root: Path, check: bool) -> list[Path]:
    """Rewrite what is made below `root`, or with `check` only find it; returns the pages that are stale."""
    stale = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        name = str(page.relative_to(root))
        fresh = render(text, root, name)
        if fresh == text:
            continue
        stale.append(page)
        if check:
            lines = difflib.unified_diff(text.splitlines(), fresh.splitlines(), name, "made anew", lineterm="", n=0)
            sys.stderr.write("\n".join(lines) + "\n")
        else:
            page.write_text(fresh, encoding="utf-8")
    return stale
