"""Linears that read the same input, merged into one matmul when a model is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halve.model.decoder import Block
from halve.model.linear import Linear
from halve.model.wiring import SUBLAYERS
from halve.quantization import QuantizedWeight


def merge_siblings(block: Block) -> None:
    """Replace linears that read the same input by one, when scheme and kept inputs agree and all outputs are kept."""
    for sublayer in SUBLAYERS.values():
        parts = [block.linears[role] for role in sublayer.readers if role in block.linears]
        if len(parts) == len(sublayer.readers) and _mergeable(parts):
            block.linears[sublayer.merged] = _concatenate(parts)
            for role in sublayer.readers:
                del block.linears[role]


def _mergeable(parts: list[nn.Module]) -> bool:
    first = parts[0]
    assert isinstance(first, Linear)
    for part in parts:
        assert isinstance(part, Linear)
        if part.output_index is not None or (part.bias is None) != (first.bias is None):
            return False
        if not _same(part.input_index, first.input_index):
            return False
        if not _same_scheme(part.weight, first.weight):
            return False
    return True


def _same_scheme(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    if isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight):
        return a.spec == b.spec and _same(a.group_index, b.group_index)
    return type(a) is type(b)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


def _concatenate(parts: list[nn.Module]) -> Linear:
    linears = [p for p in parts if isinstance(p, Linear)]
    first = linears[0]
    if isinstance(first.weight, QuantizedWeight):
        weights = [p.weight for p in linears if isinstance(p.weight, QuantizedWeight)]
        zeros = [w.zero for w in weights if w.zero is not None]
        weight = QuantizedWeight(
            torch.cat([w.packed for w in weights]),
            torch.cat([w.scale for w in weights]),
            torch.cat(zeros) if zeros else None,
            first.weight.spec,
            first.weight.in_features,
            first.weight.group_index,
        )
    else:
        weight = torch.cat([p.weight for p in linears if isinstance(p.weight, Tensor)])
    biases = [p.bias for p in linears if p.bias is not None]
    return first.replaced(
        weight=weight, bias=torch.cat(biases) if biases else None, out_features=sum(p.out_features for p in linears)
    )
