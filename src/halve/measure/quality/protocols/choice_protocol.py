"""What a protocol of multiple choice is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halve.decode.sampling import Sampling
from halve.measure.quality.prompts import Prompt
from halve.measure.quality.race import Question


@dataclass(frozen=True)
class ChoiceProtocol:
    """How a question is asked and its answer taken: from the scores of its options, or out of generated text.

    prompt: None where the template of the request makes it. read: (generated text, number of options) -> index of the
    option it names, None when it names none; without it the options are scored. What follows is of generated text alone.
    """

    name: str
    prompt: Callable[[Question], Prompt] | None
    prior: bool = False  # subtract the log-likelihood each option has without context
    default_limit: int | None = None  # questions, where the request names no other number
    read: Callable[[str, int], int | None] | None = None
    max_new_tokens: int = 20
    sampling: Sampling | None = None  # None: greedy; its seed is that of the request
    stops: bool = True  # at an end-of-text token
    over_answered: bool = False  # accuracy = right / answered instead of right / all
