"""How an answer is read out of generated text."""

from __future__ import annotations

import re

from halve.measure.quality.race import LETTERS

# The whole answer, or its first part, is one capital letter of its own: "B", "B.", "(B)", "B) the dog"; not "A dog".
STRICT = re.compile(r"\s*\(?([A-Z])(?:[).:,]|\s*(?:\n|$))")

# What the first system accepts, anywhere in the text: "answer: b", "answer is b", "b)"; in either case and with no
# border after the letter, so that "answer is because" counts as B.
SYSTEM1 = re.compile(r"answer(?::\s*|\s+is\s+)([abcd])|([abcd])\)", re.IGNORECASE)


def strict_answer(text: str, options: int) -> int | None:
    """Index of the option a generated text names at its very start, None when it names none of the options."""
    found = STRICT.match(text)
    index = LETTERS.index(found[1]) if found else options
    return index if index < options else None


def system1_answer(text: str, options: int) -> int | None:
    """Index of the first letter the loose pattern finds, None when it finds none."""
    found = SYSTEM1.search(text)
    index = LETTERS.index((found[1] or found[2]).upper()) if found else options
    return index if index < options else None
