"""Channels removed from one linear: equal to the full layer with them zeroed, in float64."""

from __future__ import annotations

import pytest
import torch

from halve.compression.edits import (
    column_norms,
    keep_inputs,
    keep_outputs,
    kept_count,
    largest,
    narrow_inputs,
    narrow_outputs,
    row_norms,
)
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, quantize
from tests.common import relative

SPECS = [None, QuantSpec(4, 8), QuantSpec(4, 8, False), QuantSpec(8, -1), QuantSpec(3, 24)]
INS, OUTS = torch.tensor([0, 3, 4, 9, 17, 22, 23]), torch.tensor([1, 2, 8, 15])


def make(spec: QuantSpec | None, bias: bool = True) -> tuple[Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 24, dtype=torch.float64, generator=generator)
    linear_bias = torch.randn(16, dtype=torch.float64, generator=generator) if bias else None
    linear = Linear(weight if spec is None else quantize(weight.float(), spec), linear_bias)
    return linear, torch.randn(3, 5, 24, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kept_inputs_equal_zeroed_columns(spec: QuantSpec | None) -> None:
    linear, x = make(spec)
    zeroed = torch.zeros_like(x)
    zeroed[..., INS] = x[..., INS]
    pruned = keep_inputs(linear, INS)
    assert relative(pruned(x), linear(zeroed)) <= 1e-12
    assert relative(keep_inputs(pruned, torch.tensor([1, 5]))(x), keep_inputs(linear, INS[[1, 5]])(x)) <= 1e-12
    assert pruned.weight.nbytes < linear.weight.nbytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kept_outputs_equal_zeroed_rows_and_keep_every_bias(spec: QuantSpec | None) -> None:
    linear, x = make(spec)
    assert linear.bias is not None
    expected = linear.bias.expand(3, 5, 16).clone()
    expected[..., OUTS] = linear(x)[..., OUTS]
    pruned = keep_outputs(linear, OUTS)
    assert relative(pruned(x), expected) <= 1e-12
    assert pruned.weight.nbytes < linear.weight.nbytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_narrowing_follows_the_neighbours(spec: QuantSpec | None) -> None:
    linear, x = make(spec)
    zeroed = torch.zeros_like(x)
    zeroed[..., INS] = x[..., INS]
    narrow = narrow_inputs(linear, INS)
    assert narrow.input_index is None and narrow.in_features == 7
    assert relative(narrow(x[..., INS]), linear(zeroed)) <= 1e-12
    narrow = narrow_outputs(linear, OUTS)
    assert narrow.output_index is None and narrow.out_features == 4
    assert relative(narrow(x), linear(x)[..., OUTS]) <= 1e-12


def test_a_quantized_layer_is_never_expanded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halve.compression.edits._CHUNK_ROWS", 4)
    expanded, original = [], QuantizedWeight.dequantize
    monkeypatch.setattr(
        QuantizedWeight, "dequantize", lambda self, *a: expanded.append(self.out_features) or original(self, *a)
    )
    linear, _ = make(QuantSpec(4, 8))
    pruned = keep_inputs(linear, largest(column_norms(linear), 7))
    pruned = keep_outputs(pruned, largest(row_norms(pruned), 5))
    assert expanded == [4, 4, 4, 4] * 2  # a few rows at a time, for their norms
    assert isinstance(pruned.weight, QuantizedWeight) and pruned.weight.shape == (5, 7)


def test_norms_of_a_hand_made_weight() -> None:
    linear = Linear(torch.tensor([[1.0, -4.0, 0.5], [2.0, 0.0, -0.5]]))
    assert column_norms(linear).tolist() == [3.0, 4.0, 1.0]
    assert row_norms(linear).tolist() == [5.5, 2.5]


def test_largest_is_sorted_and_keeps_the_first_of_equals() -> None:
    assert largest(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]), 3).tolist() == [0, 2, 4]
    assert largest(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("size", "fraction", "kept"), [(20, 0.35, 13), (3072, 0.35, 1997), (10, 0.0, 10), (7, 0.99, 1)]
)
def test_kept_count(size: int, fraction: float, kept: int) -> None:
    assert kept_count(size, fraction) == kept
