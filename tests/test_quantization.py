"""The number format: hand-computed codes, exact packing, byte equality with compressed-tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.errors import HalveError, RecipeError
from halve.quantization import QuantSpec, from_codes, pack, pack_zero, quantize, unpack, unpack_zero


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    half, generator = 1 << (bits - 1), torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_packing_is_exact_and_equals_the_library(bits: int, rows: int, columns: int, seed: int) -> None:
    q = codes(rows, columns, bits, seed)
    packed = pack(q, bits)
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(unpack(packed, bits, columns), q)
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(q.shape)), q)
    zero = pack_zero(q, bits)
    assert torch.equal(zero, pack_to_int32(q, bits, packed_dim=0))
    assert torch.equal(unpack_zero(zero, bits, rows), q)


def test_words_by_hand() -> None:
    """Codes 0..7 of 4 bits are stored as 8..15, the first in the lowest bits."""
    word = pack(torch.arange(8, dtype=torch.int8).unsqueeze(0), 4)
    assert word.tolist() == [[0xFEDCBA98 - (1 << 32)]]
    assert pack(torch.tensor([[-128, -127, 0, 127]], dtype=torch.int8), 8).tolist() == [[0xFF800100 - (1 << 32)]]


def test_symmetric_by_hand() -> None:
    """max|w| = 7.5 over (2^4 - 1) / 2 steps gives scale 1: codes are the rounded weights, clamped at 7."""
    weight = torch.tensor([[7.5, -7.5, 0.4, -3.2, 3.6, 0.0, 1.0, -1.0]])
    q = quantize(weight, QuantSpec(4, -1))
    assert q.scale.tolist() == [[1.0]] and q.zero is None
    assert q.codes().tolist() == [[7, -8, 0, -3, 4, 0, 1, -1]]


def test_asymmetric_by_hand() -> None:
    """0..15 over 15 steps: scale 1, and code -8 stands for 0."""
    q = quantize(torch.arange(16.0).unsqueeze(0), QuantSpec(4, -1, symmetric=False))
    assert q.scale.tolist() == [[1.0]] and q.zero is not None and q.zero.tolist() == [[-8]]
    assert torch.equal(q.dequantize(), torch.arange(16.0).unsqueeze(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, -1), (8, 16), (4, 32), (4, -1), (3, 16), (2, 8)])
def test_error_is_at_most_half_a_step(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    q = quantize(weight, QuantSpec(bits, group, symmetric))
    step = q.scale.repeat_interleave(64 // q.scale.shape[1], 1)
    # symmetric: max|w| falls half a step outside the top code, so a clamped weight is half a step off as well
    assert ((q.dequantize() - weight).abs() <= step * 0.5001).all()


def test_scale_is_rounded_before_codes() -> None:
    """With a bf16 scale the codes must answer to the stored scale, not to the exact one."""
    weight = torch.linspace(-1.003, 0.97, 64).unsqueeze(0)
    q = quantize(weight, QuantSpec(8, -1), torch.bfloat16)
    assert q.scale.dtype == torch.bfloat16
    expected = (weight / q.scale.float()).round().clamp(-128, 127)
    assert torch.equal(q.codes().float(), expected)


def test_zero_group_stays_zero() -> None:
    for symmetric in (True, False):
        q = quantize(torch.zeros(2, 8), QuantSpec(4, 4, symmetric))
        assert torch.equal(q.dequantize(), torch.zeros(2, 8))


def test_rows_and_columns_of_a_quantized_weight() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    for symmetric in (True, False):
        q = quantize(weight, QuantSpec(4, 8, symmetric))
        rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 17, 18, 30])
        assert torch.equal(q.rows(rows).dequantize(), q.dequantize()[rows])
        kept = q.columns(columns)
        assert torch.equal(kept.dequantize(), q.dequantize()[:, columns])
        # group 1 (columns 8..15) lost all its columns, so its scales went too
        assert kept.scale.shape == (6, 3) and kept.group_index is not None
        assert kept.group_index.tolist() == [0, 0, 1, 1, 2]
        assert torch.equal(kept.columns(torch.tensor([0, 4])).dequantize(), q.dequantize()[:, [1, 30]])


def test_nbytes_counts_the_tensors() -> None:
    q = from_codes(codes(3, 40, 4), torch.ones(3, 1), None, QuantSpec(4, -1))
    assert q.nbytes == 3 * 5 * 4 + 3 * 4


@pytest.mark.parametrize(
    ("options", "words"), [({"bits": 5}, "bits=5"), ({"group_size": 0}, "group_size=0"), ({"group_size": -2}, "-2")]
)
def test_impossible_specs(options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        QuantSpec(**options)


def test_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"128 does not divide 172 .*86, 43"):
        quantize(torch.ones(1, 172), QuantSpec(4, 128))


def test_scale_overflow_is_an_error() -> None:
    with pytest.raises(RecipeError, match="too large"):
        quantize(torch.full((1, 8), 1e9), QuantSpec(8, -1), torch.float16)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("packed", lambda t: t[:, :-1]),
        ("packed", lambda t: t[:-1]),
        ("scale", lambda t: t[:-1]),
        ("scale", torch.Tensor.flatten),
        ("zero", lambda t: t[:, :-1]),
        ("in_features", lambda n: n + 8),
        ("group_index", lambda t: t[:-1]),
    ],
)
def test_parts_that_are_not_of_one_weight_are_refused(field: str, change) -> None:
    weight = quantize(torch.randn(6, 64), QuantSpec(4, 16, symmetric=False)).columns(torch.arange(0, 64, 2))
    with pytest.raises(HalveError, match=r"no weight of \d+ columns in 4 bits: .*'scale'"):
        replace(weight, **{field: change(getattr(weight, field))})


@pytest.mark.parametrize("value", [-1, 4, 2 * 10**9])
def test_a_group_without_a_scale_is_refused(value: int) -> None:
    weight = quantize(torch.randn(6, 64), QuantSpec(4, 16))
    ragged = replace(weight, group_index=torch.full((64,), value, dtype=torch.int32))
    with pytest.raises(HalveError, match="outside of the 4 groups"):
        ragged.column_groups()
