"""What --vary means and what it refuses."""

from __future__ import annotations

import pytest

from halve.compression.recipe import as_steps
from halve.errors import RecipeError
from halve.studies.search.vary import apply, label, parse_vary

STEPS = as_steps(["drop-attention:count=1", "gptq", "l1-inputs", "drop-attention:count=1,select=influence"])


def test_ranges_lists_and_positions() -> None:
    shares, whole, listed = parse_vary(["l1-inputs.fraction=0..0.25", "4.count=1..3", "gptq.bits=8|4|3"], STEPS, 0.1)
    assert shares.values == (0.0, 0.1, 0.2, 0.25)  # the end is tried although it is no multiple
    assert whole.values == (1, 2, 3) and whole.step == 3
    assert listed.values == (8, 4, 3) and listed.resolution is None
    changed = apply(STEPS, [shares, whole, listed], (0.2, 3, 3))
    assert [changed[0], changed[1].bits, changed[2].fraction, changed[3].count] == [STEPS[0], 3, 0.2, 3]
    assert label([shares, whole], (0.2, 3)) == "l1-inputs.fraction=0.2+4.count=3"


def test_values_are_the_decimals_one_would_write() -> None:
    (varied,) = parse_vary(["l1-inputs.fraction=0..0.5"], STEPS)
    assert len(varied.values) == 51 and varied.values[35] == 0.35 and varied.values[-1] == 0.5


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ("l1-inputs.fraction", "is not STEP.key=LOW..HIGH"),
        ("prune-mlp.fraction=0..1", "'prune-mlp' is not in the recipe"),
        ("drop-attention.count=1..2", "occurs 2 times: name its position, 1 or 4"),
        ("7.count=1..2", "steps 1 to 4"),
        ("l1-inputs.share=0..1", "no option 'share'"),
        ("l1-inputs.targets=0..1", "is no number"),
        ("gptq.scale=1..2", "is no number"),
        ("l1-inputs.fraction=0..1.5", "fraction=1.5 is refused"),
        ("l1-inputs.fraction=-0.5..0.5", "fraction=-0.5 is refused"),
        ("gptq.bits=2..8", "bits=5 is refused"),
        ("4.count=0..2", "count=0 is refused"),
        ("4.count=1..2.5", "whole numbers"),
        ("4.count=3..1", "range is empty"),
        ("gptq.bits=4|4", "twice"),
        ("gptq.bits=4", "neither LOW..HIGH nor"),
    ],
)
def test_what_cannot_be_varied_is_named(vary: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_vary([vary], STEPS)
    assert words in str(caught.value)


def test_resolutions_that_mean_nothing() -> None:
    for wanted, words in ((0.0, "above 0"), (0.5, "nothing varied has one")):
        with pytest.raises(RecipeError, match=words):
            parse_vary(["4.count=1..3"], STEPS, wanted)
    with pytest.raises(RecipeError, match="varied twice"):
        parse_vary(["4.count=1..3", "4.count=1..2"], STEPS)
    with pytest.raises(RecipeError, match="nothing is varied"):
        parse_vary([], STEPS)
