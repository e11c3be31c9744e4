"""Codes in the blocks of GGUF: what the gguf package makes of them is what our codes stand for."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch

from halve.checkpoint.gguf_blocks import BLOCK, blocks, numbers_of, rounding, share, type_of
from halve.errors import CheckpointError
from halve.quantization import QuantSpec, from_codes


def theirs(weight_bytes: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(weight_bytes.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("seed", range(40))
def test_any_width_group_and_number_of_bits(seed: int) -> None:
    """Symmetric ones with scales that float16 holds to the last bit; with zero points m is rounded once more."""
    rng = random.Random(seed)
    bits, symmetric = rng.choice([2, 3, 4, 8]), rng.random() < 0.6
    spec = QuantSpec(bits, rng.choice([-1, 32, 64, 96]), symmetric or bits == 8)
    rows, columns = rng.randint(1, 9), 192 * rng.randint(1, 3)
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).to(torch.int8)

    groups = columns // spec.columns_per_group(columns)
    codes, zero = drawn((rows, columns)), None if spec.symmetric else drawn((rows, groups))
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3).to(torch.bfloat16)
    weight = from_codes(codes, scale, zero, spec)
    of_block = weight.column_groups()[::BLOCK]
    numbers = [number[:, of_block] for number in numbers_of(scale, zero, spec)]
    kind = type_of(spec)
    assert kind is not None
    made = blocks(codes, numbers, spec)
    assert made.shape == (rows, columns // kind.size * kind.bytes)
    wanted = weight.dequantize()
    if spec.symmetric:
        assert torch.equal(theirs(made, kind.name), wanted)
    else:
        # half a step of float16 (2^-11 of m), and float32's of a sum of two numbers no larger than m
        largest = numbers[1].abs().repeat_interleave(BLOCK, 1)
        assert ((theirs(made, kind.name) - wanted).abs() <= largest * (2.0**-11 + 2.0**-22)).all()


def test_the_layout_by_hand() -> None:
    """Codes 0 to 15 and then -8 to -1, -8 to -1: the first half of a block lies in the low four bits."""
    codes = torch.tensor([[*range(8), *range(8), *range(-8, 0), *range(-8, 0)]], dtype=torch.int8)
    made = blocks(codes, [torch.tensor([[0.5]])], QuantSpec(4, 32)).tolist()[0]
    assert made[:2] == [0x00, 0x38]  # 0.5 in float16, little-endian
    assert made[2:] == [(8 + i % 8) | (i % 8) << 4 for i in range(16)]


def test_what_has_no_type() -> None:
    assert type_of(QuantSpec(8, 32, symmetric=False)) is None
    named = {(b, s): kind.name for b in (2, 3, 4) for s in (True, False) if (kind := type_of(QuantSpec(b, 32, s)))}
    assert named == {(b, s): "Q4_0" if s else "Q4_1" for b in (2, 3, 4) for s in (True, False)}


def test_scales_are_counted_where_float16_does_not_hold_them() -> None:
    held = torch.tensor([0.5, 2.0**-14, 3 * 2.0**-24, -1.25])
    assert rounding(held, "w") == (0, 0.0)
    count, change = rounding(torch.tensor([0.5, 0.1, 0.2, 0.3]), "w")
    wanted = max(abs(float(np.float16(x)) - float(np.float32(x))) / float(np.float32(x)) for x in (0.1, 0.2, 0.3))
    assert count == 3 and change == pytest.approx(wanted, rel=1e-6)
    # one far below the others does not matter, and is counted
    assert rounding(torch.tensor([0.5, 1e-9]), "w") == (1, 1.0)
    assert share(1.0) == "100 %" and share(2.0**-11) == "0.05 %"


@pytest.mark.parametrize(
    ("scale", "words"),
    [(7e4, "holds 70000 and a scale of GGUF ends at 65,504"), (1e-7, "holds scales of 1e-07 at most")],
)
def test_scales_that_float16_ruins_are_refused(scale: float, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        rounding(torch.tensor([scale, scale / 2]), "w")
