"""Codes of ours as blocks of GGUF: 32 neighbours of a row, their scale in float16 before them.

Shape legend: R rows, I input features, G groups along I, B blocks of 32 along I.

A weight is (q - zero) * scale here, and there d * (q + 8) - 8 d (Q4_0), d * q (Q8_0) or d * q' + m (Q4_1), with
q' = q + 2^(b-1) and m = -(zero + 2^(b-1)) * scale: the codes are the same, what may be rounded is d and m.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halve.checkpoint.gguf_header import TYPES, BlockType
from halve.errors import CheckpointError
from halve.quantization import QuantSpec

BLOCK = 32  # codes under one scale
BY_NAME = {block.name: block for block in TYPES.values()}
_HALF = torch.finfo(torch.float16)


def type_of(spec: QuantSpec) -> BlockType | None:
    """The type of GGUF that holds all codes of a scheme; None where there is none."""
    if spec.bits == 8:
        return BY_NAME["Q8_0"] if spec.symmetric else None
    return BY_NAME["Q4_0" if spec.symmetric else "Q4_1"]


def numbers_of(scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> list[Tensor]:
    """What is stored in float16 of each group, as float32 before it is rounded: d, and m where there are zero points."""
    scale = scale.float()
    return [scale] if zero is None else [scale, -(zero.float() + (1 << (spec.bits - 1))) * scale]


def rounding(numbers: Tensor, name: str) -> tuple[int, float]:
    """How many of the `numbers` of a tensor float16 does not hold, and the largest change as a share of the number.

    Raises CheckpointError, which names the tensor, where one is too large for it, or most of the tensor is too small: then
    the change of all is more than float16's step of 2^-11.
    """
    half = numbers.half()
    if not torch.isfinite(half).all():
        raise CheckpointError(
            f"{name} holds {float(numbers.abs().max()):.6g} and a scale of GGUF ends at {_HALF.max:,.0f}: use --requantize BF16"
        )
    change = (half.float() - numbers).abs()
    moved = change > 0
    if not moved.any():
        return 0, 0.0
    if float(change.double().norm()) > 2.0**-11 * float(numbers.double().norm()):
        raise CheckpointError(
            f"{name} holds scales of {float(numbers.abs().max()):.3g} at most, and those of GGUF keep their digits from "
            f"{_HALF.smallest_normal:.2g} on: use --requantize BF16"
        )
    return int(moved.sum()), float((change[moved] / numbers[moved].abs()).max())


def blocks(codes_RI: Tensor, numbers_RB: list[Tensor], spec: QuantSpec) -> Tensor:
    """The bytes of rows, uint8 [R, bytes]: int8 codes, and of each block d (and m) in float32, which is rounded here."""
    rows, columns = codes_RI.shape
    codes = codes_RI.view(rows, columns // BLOCK, BLOCK)
    parts = [number.half().unsqueeze(-1).view(torch.uint8) for number in numbers_RB]
    if spec.bits == 8:
        parts.append(codes.view(torch.uint8))
    else:
        # Q4_0 has its codes around 8 whatever they are, Q4_1 has the least at 0
        nibbles = (codes + (8 if spec.symmetric else 1 << (spec.bits - 1))).to(torch.uint8)
        first, second = nibbles.chunk(2, -1)
        parts.append(first | (second << 4))
    return torch.cat(parts, -1).view(rows, -1)


def share(fraction: float) -> str:
    """A relative change in words, rounded up."""
    return f"{math.ceil(fraction * 1e4) / 100:g} %"
