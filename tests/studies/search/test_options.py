"""What a search is asked to keep: read, refused, and held against figures."""

from __future__ import annotations

import random
from typing import Any

import pytest

from halve.errors import HalveError
from halve.studies.search.figures import FIGURES
from halve.studies.search.options import Floor, objective_of


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "nothing to keep: give one limit"),
        ({"floor": "95%", "max_kl": 0.1}, "floor 95% and max_kl 0.1: give one limit"),
        ({"max_kl": 0.1, "min_same_top": "97%"}, "max_kl 0.1 and min_same_top 97%: give one limit"),
        ({"floor": 0.5, "max_bytes": "2MB"}, "floor 0.5 and max_bytes 2MB: give one limit"),
        ({"max_kl": 0.0}, "max_kl 0.0: give nats a token above 0"),
        ({"max_kl": -1.0}, "max_kl -1.0"),
        ({"max_kl": float("nan")}, "max_kl nan"),
        ({"max_kl": float("inf")}, "max_kl inf"),
        ({"min_same_top": "0%"}, "min_same_top '0%': give a share above 0"),
        ({"min_same_top": "101%"}, "min_same_top '101%'"),
        ({"min_same_top": "most"}, "min_same_top 'most'"),
        ({"max_bytes": "20 MiB"}, "max_bytes '20 MiB': give bytes above 0"),
        ({"max_bytes": "0"}, "max_bytes '0'"),
        ({"max_bytes": "120%"}, "max_bytes '120%'"),
        ({"max_bytes": "2MB", "lower_bound": True}, "max_bytes 2MB has no interval"),
    ],
)
def test_what_cannot_be_kept_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(HalveError) as caught:
        Floor.asked(**asked)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "figure", "level"),
    [
        ({"floor": "95%"}, "accuracy", 0.76),  # of a dense model's 0.8
        ({"floor": 0.5}, "accuracy", 0.5),
        ({"max_kl": 0.02}, "kl", 0.02),
        ({"min_same_top": "97%"}, "same-top", 0.97),
        ({"min_same_top": 0.97}, "same-top", 0.97),
        ({"max_bytes": "1.5MB"}, "bytes", 1_500_000),
        ({"max_bytes": 700}, "bytes", 700),
        ({"max_bytes": "25%"}, "bytes", 1000),
    ],
)
def test_levels_are_what_was_written(asked: dict[str, Any], figure: str, level: float) -> None:
    dense = {"accuracy": 0.8, "kl_nats_per_token": 0.0, "same_top_share": 1.0, "bytes": 4000}
    floor = Floor.asked(**asked)
    assert floor.figure == figure and floor.level(dense) == pytest.approx(level, rel=1e-12)


def test_a_trial_clears_the_floor_where_its_figure_or_the_worse_end_of_its_interval_does() -> None:
    draw = random.Random(3)
    for _ in range(400):
        name = draw.choice(["accuracy", "kl", "same-top"])
        figure, value, level = FIGURES[name], draw.random(), draw.random()
        low, high = value * draw.random(), value + (1 - value) * draw.random()
        row = {figure.key: value, str(figure.interval): [low, high]}
        dense = {figure.key: draw.random()}
        relative, lower = name == "accuracy" and draw.random() < 0.5, draw.random() < 0.5
        kept = level * dense[figure.key] if relative else level
        clears = Floor(level, relative, lower, name).shortfall(row, dense) <= 0
        if name == "kl":
            assert clears is ((high if lower else value) <= kept)
        else:
            assert clears is ((low if lower else value) >= kept)
        if lower:  # what clears it by its interval does so by itself
            assert not clears or Floor(level, relative, False, name).shortfall(row, dense) <= 0
        nothing_known = {figure.key: value, str(figure.interval): None}
        assert not lower or Floor(max(level, 1e-9), relative, True, name).shortfall(nothing_known, dense) > 0


@pytest.mark.parametrize(
    ("minimise", "asked", "found"),
    [
        (None, {"max_kl": 0.1}, "bytes"),
        ("ms", {"max_kl": 0.1}, "ms"),
        (None, {"max_bytes": 10}, "kl"),
        ("same-top", {"max_bytes": 10}, "minimise 'same-top': does not go with max_bytes 10, use kl"),
        ("kl", {"max_kl": 0.1}, "minimise 'kl': does not go with max_kl 0.1, use bytes, memory, ms"),
        ("bytes", {"max_bytes": 10}, "minimise 'bytes': does not go with max_bytes 10, use kl"),
        ("weight_bytes", {"max_kl": 0.1}, "is now called bytes"),
        ("watts", {"max_bytes": 10}, "minimise 'watts': unknown, use kl"),
    ],
)
def test_what_is_made_the_best_of_goes_with_what_is_kept(minimise: str | None, asked: dict, found: str) -> None:
    floor = Floor.asked(**asked)
    try:
        assert objective_of(minimise, floor, ("kl", "same-top")) == found
    except HalveError as error:
        assert found in str(error)
