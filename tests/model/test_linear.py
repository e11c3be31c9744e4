"""Kept inputs, kept outputs and bias against the full layer with zeros in the same places."""

from __future__ import annotations

import pytest
import torch

from halve.errors import HalveError
from halve.model.linear import Linear
from halve.quantization import QuantSpec, quantize


@pytest.mark.parametrize("quantized", [False, True])
def test_pruned_layer_equals_full_layer_with_zeros(quantized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(10, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    rows, columns = torch.tensor([0, 3, 4, 9]), torch.tensor([1, 2, 7, 8, 11])
    weight = full[rows][:, columns]
    if quantized:
        packed = quantize(weight.float(), QuantSpec(8, -1))
        weight, stored = packed.dequantize(torch.float64), packed
    else:
        stored = weight
    zeroed = torch.zeros_like(full)
    zeroed[rows[:, None], columns] = weight
    layer = Linear(stored, bias, columns, rows, 12, 10)
    expected = x @ zeroed.T + bias
    assert float((layer(x) - expected).norm() / expected.norm()) <= 1e-12


def test_a_dropped_row_keeps_its_bias() -> None:
    layer = Linear(torch.ones(1, 2), torch.tensor([5.0, 7.0]), output_index=torch.tensor([1]), out_features=2)
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[5.0, 10.0]]


def test_unknown_backend_is_named() -> None:
    with pytest.raises(HalveError, match="warp"):
        Linear(torch.ones(1, 2)).select_backend("warp", torch.float32)


def test_a_copy_has_what_was_exchanged_and_shares_the_rest() -> None:
    weight, bias, columns = torch.randn(3, 4), torch.randn(3), torch.tensor([0, 2, 3, 5])
    layer = Linear(weight, bias, columns, in_features=6)
    layer.select_backend("auto", torch.float32)
    other = layer.replaced(weight=torch.zeros(3, 4), bias=None)
    assert other.bias is None and other.input_index is columns and (other.in_features, other.out_features) == (6, 3)
    assert torch.equal(other(torch.ones(6)), torch.zeros(3))
    assert layer.bias is bias and torch.equal(layer.dense_weight(), weight)
    assert layer.kernel is not None and layer.replaced().kernel is None


def test_a_copy_has_to_fit() -> None:
    with pytest.raises(AssertionError):
        Linear(torch.ones(3, 4)).replaced(weight=torch.ones(3, 5))
