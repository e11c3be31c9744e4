"""Removing inputs and outputs of one linear layer, dense or quantized: the weight shrinks, an index remembers the rest.

Keeping (`keep_inputs`, `keep_outputs`) leaves what the layer reads and writes as wide as before; narrowing
(`narrow_inputs`, `narrow_outputs`) follows activations that became narrower, so the same indices must go in the
neighbours. Quantized weights lose codes, their scales stay as they are: nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halve.errors import RecipeError
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight

_CHUNK_ROWS = 2048  # rows of a packed weight expanded at a time


def check_fraction(step: str, fraction: float) -> None:
    """RecipeError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise RecipeError(f"step {step}: fraction={fraction} is not in [0, 1): it is the share that is removed")


def kept_count(size: int, fraction: float) -> int:
    """How many of `size` channels stay when `fraction` of them, rounded down, go."""
    return size - int(fraction * size + 1e-9)  # 0.35 * 20 is 6.999...


def _dense_rows(linear: Linear) -> Iterator[Tensor]:
    """The stored weight [K, S] as float32 (float64 stays), some rows at a time."""
    weight = linear.weight
    for first in range(0, weight.shape[0], _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        if isinstance(weight, QuantizedWeight):
            index = torch.arange(*rows.indices(weight.out_features), device=weight.device)
            yield weight.rows(index).dequantize()
        else:
            part = weight[rows]
            yield part if part.dtype == torch.float64 else part.float()


def column_norms(linear: Linear) -> Tensor:
    """L1 norm of each stored column, float64 [S]."""
    total = torch.zeros(linear.weight.shape[1], dtype=torch.float64, device=linear.weight.device)
    for rows in _dense_rows(linear):
        total += rows.abs().sum(0, dtype=torch.float64)
    return total


def row_norms(linear: Linear) -> Tensor:
    """L1 norm of each stored row, float64 [K]."""
    return torch.cat([rows.abs().sum(1, dtype=torch.float64) for rows in _dense_rows(linear)])


def largest(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending, int64; of equal scores the first ones."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


def _columns(weight: Tensor | QuantizedWeight, index: Tensor) -> Tensor | QuantizedWeight:
    return weight.columns(index) if isinstance(weight, QuantizedWeight) else weight[:, index].contiguous()


def _rows(weight: Tensor | QuantizedWeight, index: Tensor) -> Tensor | QuantizedWeight:
    return weight.rows(index) if isinstance(weight, QuantizedWeight) else weight[index].contiguous()


def keep_inputs(linear: Linear, kept: Tensor) -> Linear:
    """The layer with only the stored columns `kept` (int64, ascending); it gathers them from an input as wide as before."""
    if kept.numel() == linear.weight.shape[1]:
        return linear
    index = kept if linear.input_index is None else linear.input_index[kept]
    return linear.replaced(weight=_columns(linear.weight, kept), input_index=index)


def keep_outputs(linear: Linear, kept: Tensor) -> Linear:
    """The layer with only the stored rows `kept` (int64, ascending); the outputs of the others are their bias, or 0."""
    if kept.numel() == linear.weight.shape[0]:
        return linear
    index = kept if linear.output_index is None else linear.output_index[kept]
    return linear.replaced(weight=_rows(linear.weight, kept), output_index=index)


def narrow_inputs(linear: Linear, kept: Tensor) -> Linear:
    """The layer for inputs of which only `kept` (int64, ascending) are left; it must read all of them so far."""
    assert linear.input_index is None, "narrowing a layer that gathers its inputs"
    return linear.replaced(weight=_columns(linear.weight, kept), in_features=kept.numel())


def narrow_outputs(linear: Linear, kept: Tensor) -> Linear:
    """The layer that computes only the outputs `kept` (int64, ascending), biases too; it must compute all of them so far."""
    assert linear.output_index is None, "narrowing a layer that scatters its outputs"
    bias = None if linear.bias is None else linear.bias[kept].contiguous()
    return linear.replaced(weight=_rows(linear.weight, kept), bias=bias, out_features=kept.numel())
