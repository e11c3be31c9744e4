"""`generate`: a greedy answer to the prompt of `letter`, parsed strictly; what names no option counts as wrong."""

from __future__ import annotations

import re
from dataclasses import replace

from halve.measure.quality.prompts import Prompt
from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol
from halve.measure.quality.protocols.letter import letter_prompt
from halve.measure.quality.race import LETTERS, Question

# The whole answer, or its first part, is one capital letter of its own: "B", "B.", "(B)", "B) the dog"; not "A dog".
STRICT = re.compile(r"\s*\(?([A-Z])(?:[).:,]|\s*(?:\n|$))")


def open_prompt(question: Question) -> Prompt:
    """The prompt of `letter_prompt`, for text to be generated after it."""
    return replace(letter_prompt(question), continuations=())


def strict_answer(text: str, options: int) -> int | None:
    """Index of the option a generated text names at its very start, None when it names none of the options."""
    match = STRICT.match(text)
    index = LETTERS.index(match[1]) if match else options
    return index if index < options else None


GENERATE = ChoiceProtocol("generate", open_prompt, read=strict_answer)
