"""`letter`: the options stand in the prompt; the most probable of " A", " B", ... after "Answer:" is the answer."""

from __future__ import annotations

from halve.measure.quality.prompts import Prompt, lettered
from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol
from halve.measure.quality.race import LETTERS, Question


def letter_prompt(question: Question) -> Prompt:
    """The question with lettered options and the cue "Answer:"; continued by " A", " B", ..."""
    letters = LETTERS[: len(question.options)]
    tail = f"\nQuestion: {question.text}\n{lettered(question)}\nAnswer:"
    return Prompt("Article: ", question.article, tail, tuple(f" {letter}" for letter in letters), one_cut=True)


LETTER = ChoiceProtocol("letter", letter_prompt)
