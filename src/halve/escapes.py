"""Names, paths and messages as text that does nothing else where it is shown: a function for each format of output."""

from __future__ import annotations

import re
from itertools import islice

MOST = 5000  # characters of one text; longer ones are cut
# what a spreadsheet takes for the beginning of a formula, in full width too
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def plain(text: object, most: int = MOST) -> str:
    """One line that shows any text: of a terminal, and what the other formats start from.

    What cannot be seen, moves the cursor, breaks a line or turns the direction of writing stands as its code (\\x1b,
    \\n, \\u202e), spaces stay. At most `most` characters, the last an ellipsis where some were left out.
    """
    shown = "".join(islice((_visible(c) for c in str(text)), most + 1))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def lines(text: str) -> str:
    """Text of several lines for a terminal, such as what a model writes: as `plain`, all of it, with line ends and tabs."""
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def markdown(text: object) -> str:
    """One line that Markdown (CommonMark, tables of GitHub) shows as `plain` does, also inside a cell of a table."""
    # an underscore inside a word means nothing there; a word between colons is a picture
    return re.sub(r"[\\`*|<>\[\]&~$]|(?<![^\W_])_|_(?![^\W_])|:(?=[\w+-]+:)", r"\\\g<0>", plain(text))


def csv_cell(value: object) -> object:
    """A number as it is; text as `plain`, with a ' before what a spreadsheet would compute."""
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
