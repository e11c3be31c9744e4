"""The C kernels against float64, for every weight they take and every instruction set this processor has."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from halve import kernels
from halve.errors import HalveError
from halve.kernels import cpu
from halve.kernels.cpu import BlockedWeight, CpuMatmul
from halve.kernels.reference import ReferenceMatmul
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, from_codes, quantize
from tests.common import relative

ROWS_OF_X = (1, 2, 3, 8, 67)  # the last is more than the kernels take at a time
OUT = 37  # odd: neither a whole block of 16 rows nor of 4

# y's error comes from rounding x to 16 bits under the peak of 128 values: an error uniform within half a step of
# peak / 32639, so peak / 32639 / sqrt(12) root mean square. Of 128 Gaussians the peak is 2.7 on average, 4.5 at most in
# these few thousand, so 4e-5 relative at the very most; float32 sums of products that cancel add less than 1e-6.
PACKED_ERROR = 4e-5
DENSE_ERROR = 1e-6
# rounding y to the 8 significant bits of bfloat16: at most 2^-8 relative for each value
BF16_ERROR = 2**-8


@pytest.fixture(params=["avx512-vnni", "avx-vnni", "avx2", "generic"])
def matmul(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[CpuMatmul]:
    """CpuMatmul for one instruction set."""
    library = cpu.open_library(request.param)
    if isinstance(library, str):
        pytest.skip(library)
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    return CpuMatmul


def check(matmul: type[CpuMatmul], weight: Tensor | QuantizedWeight, numbers: Tensor, error: float) -> None:
    """The product with `weight`, whose numbers are known, for every count of rows and dtype of x."""
    prepared = {dtype: matmul(weight, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for rows in ROWS_OF_X:
        for dtype, multiply in prepared.items():
            x = torch.randn(rows, weight.shape[1]).to(dtype)
            y = multiply(x)
            assert y.dtype == dtype and y.shape == (rows, weight.shape[0])
            limit = error + (BF16_ERROR if dtype == torch.bfloat16 else 0)
            assert relative(y, x.double() @ numbers.double().T) < limit, (rows, dtype)


def test_the_library_is_built() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: halve runs without the C kernels")
    library = cpu.load_library()
    assert not isinstance(library, str), library


@pytest.mark.parametrize("columns", [19, 64, 333, 4205])  # the last does not share the first-level cache with others
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(matmul: type[CpuMatmul], dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(OUT, columns).to(dtype)
    check(matmul, weight, weight, DENSE_ERROR)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 10, 32, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed(matmul: type[CpuMatmul], bits: int, group_size: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    columns = 250 if group_size == 10 else 512
    weight = quantize(torch.randn(OUT, columns), QuantSpec(bits, group_size, symmetric))
    check(matmul, weight, weight.dequantize(), PACKED_ERROR)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scales_in_every_dtype(matmul: type[CpuMatmul], scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUT, 256), QuantSpec(4, 64), scale_dtype)
    check(matmul, weight, weight.dequantize(), PACKED_ERROR)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ragged_groups(matmul: type[CpuMatmul], bits: int) -> None:
    torch.manual_seed(0)
    whole = quantize(torch.randn(OUT, 384), QuantSpec(bits, 64, symmetric=False))
    kept = torch.randperm(384)[:251]
    for columns in (kept.sort().values, kept):  # in order, as pruning leaves them, and in no order at all
        weight = whole.columns(columns)
        check(matmul, weight, whole.dequantize()[:, columns], PACKED_ERROR)


def test_exact_where_x_is(matmul: type[CpuMatmul]) -> None:
    # whole numbers up to 32639 are their own 16-bit codes, so every step is exact, whatever their two bytes are:
    # 3 * 32639 - 8 * 5 + 1 * -32639 + 2 * 128 - 1 * -129 + 7 * 1 = 65630
    codes, x = torch.zeros(1, 8, dtype=torch.int8), torch.zeros(1, 8)
    columns = torch.tensor([1, 2, 3, 4, 5, 7])
    codes[0, columns] = torch.tensor([3, -8, 1, 2, -1, 7], dtype=torch.int8)
    x[0, columns] = torch.tensor([32639.0, 5.0, -32639.0, 128.0, -129.0, 1.0])
    scale = torch.ones(1, 1)
    assert matmul(from_codes(codes, scale, None, QuantSpec(4, -1)), torch.float32)(x).item() == 65630
    # zero point 2 takes 2 * (32639 + 5 - 32639 + 128 - 129 + 1) = 10 off
    zero = torch.full((1, 1), 2, dtype=torch.int8)
    weight = from_codes(codes, scale, zero, QuantSpec(4, -1, symmetric=False))
    assert matmul(weight, torch.float32)(x).item() == 65620


def test_the_largest_sums_do_not_overflow(matmul: type[CpuMatmul]) -> None:
    # 256 columns of code -128 against x = 32639 throughout: the most an accumulator ever holds
    weight = from_codes(torch.full((16, 256), -128, dtype=torch.int8), torch.ones(16, 1), None, QuantSpec(8, -1))
    y = matmul(weight, torch.float32)(torch.full((1, 256), 32639.0))
    assert torch.equal(y, torch.full((1, 16), -128 * 32639.0 * 256))


@pytest.mark.parametrize("spec", [QuantSpec(8, -1), QuantSpec(4, 128), QuantSpec(4, 32, symmetric=False)])
def test_outliers_cost_less_than_bfloat16_does(matmul: type[CpuMatmul], spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(256, 1024), spec)
    x = torch.randn(4, 1024)
    x[:, ::100] *= 1000
    x = x.bfloat16()
    expected = x.double() @ weight.dequantize().double().T
    ours = relative(matmul(weight, torch.float32)(x.float()), expected)
    assert ours < relative(ReferenceMatmul(weight, torch.bfloat16)(x), expected) / 5
    # rounded to bfloat16 both ways, where only the last rounding is left
    assert relative(matmul(weight, torch.bfloat16)(x), expected) < relative(
        ReferenceMatmul(weight, torch.bfloat16)(x), expected
    )


def test_zeros_tiny_and_no_numbers(matmul: type[CpuMatmul]) -> None:
    weight = quantize(torch.randn(OUT, 128), QuantSpec(4, 32))
    multiply = matmul(weight, torch.float32)
    assert torch.equal(multiply(torch.zeros(2, 128)), torch.zeros(2, OUT))
    assert torch.equal(multiply(torch.full((1, 128), 1e-44)), torch.zeros(1, OUT))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 128)
        x[0, 5] = bad
        assert not multiply(x).isfinite().any()
    assert multiply(torch.ones(0, 128)).shape == (0, OUT)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stored_form_can_be_had_back(matmul: type[CpuMatmul], bits: int) -> None:
    torch.manual_seed(0)
    whole = quantize(torch.randn(OUT, 256), QuantSpec(bits, 32, symmetric=False), torch.bfloat16)
    for weight in (whole, whole.columns(torch.randperm(256)[:101])):
        prepared = matmul(weight, torch.float32).weight
        assert isinstance(prepared, BlockedWeight) and prepared.shape == weight.shape
        stored = prepared.stored()
        assert torch.equal(stored.packed, weight.packed)
        assert torch.equal(stored.scale, weight.scale) and stored.scale.dtype == torch.bfloat16
        assert stored.zero is not None and weight.zero is not None and torch.equal(stored.zero, weight.zero)
        assert torch.equal(prepared.dequantize(), weight.dequantize())


def test_tiles_of_expanded_weights(matmul: type[CpuMatmul], monkeypatch: pytest.MonkeyPatch) -> None:
    # the way of processors with bfloat16 units; rounding the weights to bfloat16 adds as much error as rounding y
    torch.manual_seed(0)
    for units in ("has_bf16", "has_tiles"):
        monkeypatch.setattr(cpu.load_library(), units, True)
    monkeypatch.setattr(cpu, "_TILE_BYTES", 4 * 96 * 32)  # 32 of the 37 rows, then 5
    weights: list[Tensor | QuantizedWeight] = [torch.randn(OUT, 96), torch.randn(OUT, 96).bfloat16()]
    whole = quantize(torch.randn(OUT, 128), QuantSpec(4, 32, symmetric=False))
    weights += [quantize(torch.randn(OUT, 96), QuantSpec(bits, 32)) for bits in (2, 3, 4, 8)]
    weights.append(whole.columns(torch.randperm(128)[:96]))
    for weight in weights:
        numbers = weight if isinstance(weight, Tensor) else weight.dequantize()
        for dtype, limit in ((torch.float32, DENSE_ERROR), (torch.bfloat16, 2 * BF16_ERROR)):
            x = torch.randn(2, 10, 96).to(dtype)
            y = matmul(weight, dtype)(x)
            assert y.shape == (2, 10, OUT) and y.dtype == dtype
            assert relative(y, x.double() @ numbers.double().T) < limit


def test_threads_do_not_change_the_result() -> None:
    if isinstance(reason := cpu.load_library(), str):
        pytest.skip(reason)
    torch.manual_seed(0)
    multiply = CpuMatmul(quantize(torch.randn(1024, 512), QuantSpec(4, 64)), torch.float32)
    x, threads = torch.randn(1, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = multiply(x)
        torch.set_num_threads(2)
        assert torch.equal(multiply(x), one)
    finally:
        torch.set_num_threads(threads)


def test_a_layer_keeps_one_form_of_its_weight() -> None:
    if isinstance(reason := cpu.load_library(), str):
        pytest.skip(reason)
    torch.manual_seed(0)
    weight = quantize(torch.randn(64, 256), QuantSpec(4, 64), torch.bfloat16)
    layer = Linear(weight)
    assert layer.select_backend("cpu", torch.bfloat16).endswith("-int4")
    assert layer.matmul is not None and isinstance(layer.matmul.weight, BlockedWeight)
    assert layer.nbytes == weight.nbytes and torch.equal(layer.weight.packed, weight.packed)
    assert torch.equal(layer.dense_weight(), weight.dequantize())
    dense = torch.randn(8, 8)
    layer = Linear(dense)
    layer.select_backend("cpu", torch.float32)
    assert layer.weight is dense  # a tied head goes on sharing the embedding


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 4)
    if not isinstance(cpu.load_library(), str):
        with pytest.raises(HalveError, match=r"float32 and bfloat16, not torch\.float16"):
            kernels.select("cpu", weight, torch.float16)
    cpu.load_library.cache_clear()
    monkeypatch.setenv("HALVE_NO_C", "1")
    try:
        assert kernels.select("auto", weight, torch.float32).kernel == "torch.linear"
        with pytest.raises(HalveError, match="switched off by HALVE_NO_C"):
            kernels.select("cpu", weight, torch.float32)
    finally:
        cpu.load_library.cache_clear()
