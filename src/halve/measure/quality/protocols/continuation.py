"""`continuation`: the option whose own text is most probable after the prompt that a template makes."""

from __future__ import annotations

from collections.abc import Callable

from halve.measure.quality.prompts import Prompt
from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol
from halve.measure.quality.race import Question


def option_prompt(question: Question) -> Prompt:
    """The question with the cue "Answer:", options not listed; continued by each option's text."""
    return Prompt("Article: ", question.article, f"\nQuestion: {question.text}\nAnswer:", _continuations(question))


def plain_prompt(question: Question) -> Prompt:
    """The article alone, continued by each option's text; the question's text is not used."""
    return Prompt("", question.article, "", _continuations(question))


def _continuations(question: Question) -> tuple[str, ...]:
    return tuple(f" {option}" for option in question.options)


# The prompts of protocols that have none of their own; the default first
TEMPLATES: dict[str, Callable[[Question], Prompt]] = {"race": option_prompt, "plain": plain_prompt}
CONTINUATION = ChoiceProtocol("continuation", None)
