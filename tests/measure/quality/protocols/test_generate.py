"""Answers read out of hand-written generations."""

from __future__ import annotations

import pytest

from halve.measure.quality.protocols.generate import strict_answer


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


def test_a_letter_beyond_the_options_is_no_answer() -> None:
    assert strict_answer("C", 2) is None
