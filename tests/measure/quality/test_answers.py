"""Answers read out of hand-written generations."""

from __future__ import annotations

import pytest

from halve.measure.quality.answers import strict_answer, system1_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" B", 1),
        ("B.", 1),
        ("\n(C) the cow", 2),
        ("A) a dog", 0),
        ("D: because", 3),
        ("B\nQuestion: and then?", 1),
        (" A, since", 0),
        ("A dog", None),  # an article, not an answer
        ("Because", None),
        ("b", None),
        ("The answer is B", None),
        ("E.", None),  # no such option
        ("(", None),
        ("", None),
    ],
)
def test_strict_parse_takes_a_leading_letter_only(text: str, expected: int | None) -> None:
    assert strict_answer(text, 4) == expected


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
    assert strict_answer("C", 2) is None
    assert system1_answer("answer: d", 3) is None
