"""The first system's own ways of measuring, which only its study uses: how it asks questions, and what it times.

They are no good measures (docs/evaluation.md says why); they are here so that its tables can be compared with. `SYSTEM1`
goes to an evaluation as its protocol, `System1Timing` to a benchmark as what is timed besides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from halve.decode.sampling import Sampling
from halve.measure.quality.prompts import Prompt, lettered
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.race import LETTERS, Question
from halve.measure.speed.timed_model import ExtraTiming
from halve.measure.speed.timing import generation_ms, spread
from halve.model.decoder import Model

QUESTIONS = 100  # it asks the first of a set
# What it accepts, anywhere in the text: "answer: b", "answer is b", "b)"; in either case and with no border after the
# letter, so that "answer is because" counts as B.
LOOSE = re.compile(r"answer(?::\s*|\s+is\s+)([abcd])|([abcd])\)", re.IGNORECASE)


def system1_prompt(question: Question) -> Prompt:
    """Lettered options and an instruction, no "Answer:" cue."""
    choose = "Select the best choice from the following options:"
    return Prompt("Article: ", question.article, f"\nQuestion: {question.text}\n{choose}\n{lettered(question)}\n")


def system1_answer(text: str, options: int) -> int | None:
    """Index of the first letter the loose pattern finds, None when it finds none."""
    match = LOOSE.search(text)
    index = LETTERS.index((match[1] or match[2]).upper()) if match else options
    return index if index < options else None


SYSTEM1 = ChoiceProtocol(
    "system1",
    system1_prompt,
    read=system1_answer,
    sampling=Sampling(temperature=0.6, top_k=50, top_p=0.9),  # it leaves Llama-3.2's own generation settings in force
    stops=False,
    over_answered=True,
    default_limit=QUESTIONS,
)


def protocol_named(name: str | None) -> str | ChoiceProtocol | None:
    """The protocol itself where `name` is its; any other name is left to the evaluation, which knows its own."""
    return SYSTEM1 if name == SYSTEM1.name else name


class System1Timing(ExtraTiming):
    """The wall time of one token, t(1), and the rate of 100 more, 100 / (t(101) - t(1)); both whole `generate` calls."""

    name = "system1"
    new_tokens = 101

    def time(self, model: Model, prompt: list[int]) -> tuple[float, float]:
        return generation_ms(model, prompt, 1), generation_ms(model, prompt, self.new_tokens)

    def figures(self, rounds: Sequence[tuple[float, ...]]) -> dict[str, float]:
        low, first, high = spread([one for one, _ in rounds])
        rates = [1e3 * (self.new_tokens - 1) / (many - one) for one, many in rounds]
        return {
            "latency_ms": first,
            "latency_ms_p10": low,
            "latency_ms_p90": high,
            "tokens_per_s": spread(rates)[1],
        }
