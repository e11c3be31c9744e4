"""Rounding of widths, and one total over several layers."""

from __future__ import annotations

import pytest
import torch

from halve.compression.methods.allocation import allocate, parse_widths, rounded_width
from halve.errors import RecipeError


@pytest.mark.parametrize(
    ("size", "fraction", "multiple", "kept"),
    [
        (8192, 0.2, 128, 6528),  # 6553.6 is nearer 51 * 128 than 52 * 128
        (8192, 0.1, 128, 7424),
        (172, 0.2, 4, 136),
        (172, 0.0, 128, 172),
        (8, 0.25, 1, 6),
        (4, 0.3, 1, 3),
    ],
)
def test_rounded_width(size: int, fraction: float, multiple: int, kept: int) -> None:
    assert rounded_width("prune-mlp", size, fraction, multiple, "channel") == kept


@pytest.mark.parametrize(
    ("size", "fraction", "multiple", "remedy"),
    [
        (172, 0.1, 128, "multiple_of=32"),  # 154.8 -> 160
        (172, 0.99, 4, "multiple_of=2"),  # nothing would be left: 1.72 -> 2
        (48, 0.99, 4, r"\(0.75, 0.8333, 0.9167, ...\)"),
        (4, 0.1, 1, "0.25"),
        (1, 0.5, 1, "leave this step out"),
    ],
)
def test_widths_that_cannot_be_rounded_name_what_fits(size: int, fraction: float, multiple: int, remedy: str) -> None:
    with pytest.raises(RecipeError, match=remedy):
        rounded_width("prune-mlp", size, fraction, multiple, "channel")


def test_parse_widths() -> None:
    assert parse_widths("prune-mlp", ("12", "0")) == [12, 0]
    with pytest.raises(RecipeError, match=r"1\.5"):
        parse_widths("prune-mlp", ("12", "1.5"))


def test_allocation_takes_the_cheapest_channels() -> None:
    # channels of the first layer cost 1 each, of the second 3, the third has no sublayer
    losses = [torch.arange(1, 10.0), 3 * torch.arange(1, 10.0), torch.zeros(0)]
    assert allocate([10, 10, 0], losses, 15, 1) == [5, 10, 0]
    # a fifth stays whatever it costs: then the other layer pays
    assert allocate([10, 10, 0], losses, 9, 1) == [2, 7, 0]


def test_allocation_evens_out_growing_losses() -> None:
    losses = [torch.arange(1, 12.0) ** 2, torch.arange(1, 12.0) ** 2]
    assert allocate([12, 12], losses, 16, 1) == [8, 8]
    assert allocate([12, 12], losses, 16, 4) == [8, 8]


def test_allocation_goes_down_in_multiples() -> None:
    losses = [torch.arange(1, 172.0), 2 * torch.arange(1, 172.0)]
    widths = allocate([172, 172], losses, 300, 16)
    assert widths[1] == 172 and widths[0] % 16 == 0 and sum(widths) <= 300
