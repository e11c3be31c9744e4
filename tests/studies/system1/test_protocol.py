"""The first system's prompt, pattern and figures, which this study alone measures by."""

from __future__ import annotations

from typing import Any

import pytest

from halve.errors import HalveError
from halve.measure.quality.multiple_choice import summarise
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.prompts import EncodedPrompt
from halve.measure.quality.race import Question
from halve.measure.quality.tasks.race_high import RACE_HIGH
from halve.studies.system1.protocol import SYSTEM1, System1Timing, protocol_named, system1_answer, system1_prompt

ASKED = EvaluationOptions("race-h", protocol=SYSTEM1)


def test_the_prompt_to_the_letter() -> None:
    prompt = system1_prompt(Question("a", "Tom has a cat.", "What has Tom?", ("a dog", "a cat", "an owl"), 1))
    assert prompt.context == (
        "Article: Tom has a cat.\nQuestion: What has Tom?\nSelect the best choice from the following options:\n"
        "A) a dog\nB) a cat\nC) an owl\n"
    )
    assert prompt.continuations == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is C.", 2),
        ("The answer is because he was ill", 1),
        ("ANSWER:  d", 3),
        ("Answer: Because", 1),
        ("answer is\n a dog", 0),
        ("I think (B) fits", 1),
        ("the dog) and the answer is A", 0),  # "g)" is no option; the first letter of a to d that fits counts
        ("the cab) no, answer: A", 1),
        ("D) is wrong, the answer is A", 3),
        ("The answer is not given", None),
        ("The answer: the dog", None),
        ("B", None),
        ("The answer was B", None),
        ("", None),
    ],
)
def test_the_loose_pattern_finds_what_the_first_system_found(text: str, expected: int | None) -> None:
    assert system1_answer(text, 4) == expected


def test_a_letter_beyond_the_options_is_no_answer() -> None:
    assert system1_answer("answer: d", 3) is None


def summary(texts: list[str | None]) -> dict[str, Any]:
    """The figures of hand-written generations to questions whose right answer is always B; two questions an article."""
    questions = [Question(f"article{i // 2}", "text", "What?", ("a", "b", "c", "d"), 1) for i in range(len(texts))]
    encoded = [EncodedPrompt((), (), overflow=text is None) for text in texts]
    results = [None if text is None else {"text": text} for text in texts]
    return summarise(questions, encoded, results, RACE_HIGH.choice_options(ASKED))


def test_accuracy_is_over_the_answered_questions() -> None:
    record = summary(["answer is because", "The answer is C", "no idea", "B) or D)", None, ""])
    assert (record["questions"], record["answered"], record["correct"], record["overflow"]) == (6, 3, 2, 1)
    assert record["accuracy"] == pytest.approx(2 / 3)
    assert record["answers"] == {"article0": "10", "article1": "-1", "article2": "--"}
    assert record["sampling"] == {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "seed": 0}


def test_accuracy_is_undefined_when_nothing_was_answered() -> None:
    record = summary(["no idea", "", None])
    assert record["accuracy"] is None and record["accuracy_ci95"] is None
    assert record["not_measured"]["accuracy"] == "undefined: none of the 3 questions was answered"


def test_the_first_hundred_questions_unless_asked_otherwise() -> None:
    assert RACE_HIGH.choice_options(ASKED).limit == 100
    assert RACE_HIGH.choice_options(EvaluationOptions("race-h", protocol=SYSTEM1, limit=7)).limit == 7


def test_the_name_stands_for_the_protocol_where_the_study_is_known_only() -> None:
    assert protocol_named("system1") is SYSTEM1 and protocol_named("pmi") == "pmi" and protocol_named(None) is None
    with pytest.raises(HalveError, match="protocol 'system1': unknown for task race-h"):
        EvaluationOptions("race-h", protocol="system1")
    with pytest.raises(HalveError, match="protocol 'system1': unknown for task perplexity; choose one of windows"):
        EvaluationOptions("perplexity", protocol=SYSTEM1)


def test_timing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "halve.studies.system1.protocol.generation_ms", lambda model, prompt, tokens: 30.0 if tokens == 1 else 530.0
    )
    timing = System1Timing()
    figures = timing.figures([timing.time(None, [0])] * 2)  # type: ignore[arg-type]
    assert figures["latency_ms"] == 30.0
    assert figures["tokens_per_s"] == pytest.approx(200.0)  # 100 tokens in half a second
