"""Figures in words, by hand."""

from __future__ import annotations

import pytest

from halve.measure.units import (
    byte_unit,
    show_accuracy,
    show_bytes,
    show_difference,
    show_duration,
    show_fraction,
    show_percent,
    show_perplexity,
    show_share,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_040_128, "1.04 MB"),
        (248_004_608, "248 MB"),
        (6.56e9, "6.56 GB"),
        (1.4e12, "1400 GB"),
    ],
)
def test_bytes_as_text(count: float, text: str) -> None:
    assert show_bytes(count) == text


def test_shares_keep_two_digits() -> None:
    assert [show_share(x) for x in (0.00294, 0.05, 0.0999, 0.62, 1.0)] == ["0.29 %", "5 %", "10 %", "62 %", "100 %"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_040_128, "1.04 MB"), (248_004_608, "248.00 MB"), (1.4e12, "1400.00 GB")],
)
def test_bytes_with_decimals(count: float, text: str) -> None:
    assert show_bytes(count, 2) == text


def test_an_axis_takes_the_unit_of_its_largest_value() -> None:
    assert [byte_unit(top) for top in (999, 1000, 2e6, 5e12)] == [(1, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")]


def test_durations_are_as_rough_as_the_estimate() -> None:
    assert [show_duration(s) for s in (0.2, 89, 90, 5399, 5400)] == ["1 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_per_cent() -> None:
    assert [show_percent(0.9184), show_percent(0.501, 0), show_fraction(0.025), show_fraction(0.1)] == [
        "91.8 %", "50 %", "2.5 %", "10 %",
    ]  # fmt: skip


def test_quality() -> None:
    assert show_accuracy(0.918, 0.894, 0.942) == "91.8 % [89.4, 94.2]"
    assert (show_accuracy(0.918), show_accuracy("undefined")) == ("91.8 %", "undefined")
    assert [show_perplexity(x) for x in (6.54321, 99.9994, 123.456, 1e6)] == ["6.543", "99.999", "123.5", "1e+06"]
    assert [show_difference(-0.004, 0.158), show_difference(0.1, 0.0002)] == ["-0.4 (p = 0.158)", "+10.0 (p < 0.001)"]
