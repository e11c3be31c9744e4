"""The C kernels against float64, for every weight they take and every instruction set this processor has."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halve import kernels
from halve.errors import HalveError
from halve.kernels import cpu
from halve.kernels.cpu import BlockedWeight, CpuMatmul
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, from_codes, quantize
from tests.common import relative

ROWS_OF_X = (1, 2, 3, 8, 67)  # the last is more than the kernels take at a time
OUT = 37  # odd: neither a whole block of 16 rows nor of 4

# y's error comes from rounding x to 16 bits under the peak of 128 values: an error uniform within half a step of
# peak / 32639, so peak / 32639 / sqrt(12) root mean square. Of 128 Gaussians the peak is 2.7 on average, 4.5 at most in
# these few thousand, so 4e-5 relative at the very most; float32 sums of products that cancel add less than 1e-6.
PACKED_ERROR = 4e-5
# a float32 product: sums of up to 128 products, each rounded to 2^-24 of what is there by then
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
            limit = DENSE_ERROR if dtype == torch.float32 else error + BF16_ERROR
            assert relative(y, x.double() @ numbers.double().T) < limit, (rows, dtype)


def rounded(matmul: type[CpuMatmul], weight: QuantizedWeight) -> Callable[[Tensor], Tensor]:
    """The product of a weight prepared for bfloat16 with float32 rows, as decode steps have it: y is not rounded again."""
    return matmul(weight, torch.bfloat16)


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
    assert rounded(matmul, from_codes(codes, scale, None, QuantSpec(4, -1)))(x).item() == 65630
    # zero point 2 takes 2 * (32639 + 5 - 32639 + 128 - 129 + 1) = 10 off
    zero = torch.full((1, 1), 2, dtype=torch.int8)
    weight = from_codes(codes, scale, zero, QuantSpec(4, -1, symmetric=False))
    assert rounded(matmul, weight)(x).item() == 65620


def test_the_largest_sums_do_not_overflow(matmul: type[CpuMatmul]) -> None:
    # 256 columns of code -128 against x = 32639 throughout: the most an accumulator ever holds
    weight = from_codes(torch.full((16, 256), -128, dtype=torch.int8), torch.ones(16, 1), None, QuantSpec(8, -1))
    y = rounded(matmul, weight)(torch.full((1, 256), 32639.0))
    assert torch.equal(y, torch.full((1, 16), -128 * 32639.0 * 256))


# Numbers above 32 times the median of their segment are multiplied as they are, so that the step of the others is at most
# 32 / 32639 of the median and the error of each 32 / 32639 / sqrt(12) = 2.8e-4 of it, root mean square. Half of the others
# are the median at least, so that is 4e-4 of their own root mean square; rounded to bfloat16, 8 significant bits, they
# would be 2^-8 / sqrt(12) / sqrt(2) = 8e-4 off or more. A Gaussian segment has less, as PACKED_ERROR says.
OUTLIER_ERROR = 4e-4


@st.composite
def with_outliers(draw: st.DrawFn) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """A weight, rows of x, and where x has one to eight numbers 10^2 to 10^6 times as large in every segment."""
    torch.manual_seed(draw(st.integers(0, 99)))
    spec = QuantSpec(
        draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([-1, 32, 128, 256])), draw(st.booleans())
    )
    weight = quantize(torch.randn(OUT, 512), spec)
    if draw(st.booleans()):
        weight = weight.columns(torch.randperm(512)[: draw(st.integers(60, 511))])
    x = torch.randn(draw(st.sampled_from([1, 3, 17])), weight.in_features)
    far = torch.zeros(x.shape, dtype=torch.bool)
    for group in weight.column_groups().unique():
        members = (weight.column_groups() == group).nonzero().flatten()
        for segment in members.split(128):
            most = min(8, (len(segment) - 1) // 2)  # the median is not one of them
            places = [torch.randperm(len(segment))[: draw(st.integers(min(1, most), most))] for _ in x]
            for row, place in enumerate(places):
                far[row, segment[place]] = True
    x[far] *= 10 ** torch.empty(int(far.sum())).uniform_(2, 6)
    return weight, x, far


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(case=with_outliers())
def test_outliers_cost_their_neighbours_nothing(
    matmul: type[CpuMatmul], case: tuple[QuantizedWeight, Tensor, Tensor]
) -> None:
    weight, x, far = case
    numbers = weight.dequantize().double()
    exact = x.double() @ numbers.T
    assert relative(matmul(weight, torch.float32)(x), exact) < DENSE_ERROR
    y = rounded(matmul, weight)(x)
    assert relative(y, exact) < PACKED_ERROR
    # what the others make of y, to float32's rounding of a y of the size of the outliers
    others = x.masked_fill(far, 0).double() @ numbers.T
    float32 = 2**-22 * (x.double().abs() @ numbers.abs().T).norm()
    assert (y.double() - exact).norm() < OUTLIER_ERROR * others.norm() + float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("count", [1, 8, 63])
def test_neighbours_of_outliers_that_meet_zeros(matmul: type[CpuMatmul], bits: int, size: float, count: int) -> None:
    """No weight where x is large: y is the others' alone, and in float32 as near to float64 as without outliers."""
    torch.manual_seed(0)
    far = torch.zeros(256, dtype=torch.bool)
    far[torch.randperm(128)[:count]] = True
    codes = quantize(torch.randn(OUT, 256), QuantSpec(bits, 128)).codes()
    codes[:, far] = 0
    weight = from_codes(codes, torch.rand(OUT, 2), None, QuantSpec(bits, 128))
    x = torch.randn(1, 256)
    x[:, far] *= size
    exact = x.double() @ weight.dequantize().double().T
    assert relative(rounded(matmul, weight)(x), exact) < OUTLIER_ERROR
    assert relative(matmul(weight, torch.float32)(x), exact) < DENSE_ERROR


@pytest.mark.parametrize("exponent", range(-126, 120, 6))
def test_sizes_of_x_from_one_end_of_float32_to_the_other(matmul: type[CpuMatmul], exponent: int) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUT, 128), QuantSpec(8, 32))
    x = torch.randn(1, 128) * 2.0**exponent
    exact = x.double() @ weight.dequantize().double().T
    spacing = 2.0**-149 * 128  # of the smallest float32, in every product
    for multiply, error in ((rounded(matmul, weight), PACKED_ERROR), (matmul(weight, torch.float32), DENSE_ERROR)):
        assert (multiply(x).double() - exact).norm() < error * exact.norm() + spacing


def test_zeros_and_no_numbers(matmul: type[CpuMatmul]) -> None:
    weight = quantize(torch.randn(OUT, 128), QuantSpec(4, 32))
    for multiply in (matmul(weight, torch.float32), rounded(matmul, weight)):
        assert torch.equal(multiply(torch.zeros(2, 128)), torch.zeros(2, OUT))
        for bad in (float("nan"), float("inf"), -float("inf")):
            for places in ([5], [5, 6, 7], list(range(128))):
                x = torch.ones(1, 128)
                x[0, places] = bad
                assert not multiply(x).isfinite().any()
        assert multiply(torch.ones(0, 128)).shape == (0, OUT)


def test_sparse_vectors_stay_codes(matmul: type[CpuMatmul]) -> None:
    """Zeros count for no median: after a ReLU most are, and the others are no outliers of theirs."""
    weight = from_codes(torch.ones(16, 128, dtype=torch.int8), torch.ones(16, 1), None, QuantSpec(8, -1))
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([1.0, 1.3e-5, 0.5])  # 1.3e-5 is less than half a step of 1 / 32639
    assert torch.equal(rounded(matmul, weight)(x), torch.full((1, 16), (32639 + 16320) * (1 / 32639)))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 64),
        torch.ones(1, 255),
        torch.ones(1, 128).half(),
        torch.ones(1, 128).double(),
        torch.ones(1, 128, device="meta"),
    ],
)
def test_an_x_that_does_not_fit_is_refused(matmul: type[CpuMatmul], x: Tensor) -> None:
    with pytest.raises(HalveError, match=r"does not fit: the weight reads \[\.\.\., 128\]"):
        matmul(quantize(torch.randn(OUT, 128), QuantSpec(4, 32)), torch.float32)(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "no rows"),
        ({"in_features": 0}, "no rows or no columns"),
        ({"bits": 3}, "another width"),
        ({"scale_kind": 7}, "scales of another kind"),
        ({"columns": 112}, "not the words'"),
        ({"words": 2**40}, "not the words'"),
        ({"groups": 3}, "a group that is not there"),
        ({"segments": 3}, "end before or behind the words"),
        ({"segments": 0}, "no segments"),
        ({"order": None}, "padding and no order"),
        ({"in_features": 90}, "an input that is not there"),
        ({"segment_end": [3, 3, 9, 13]}, "empty or too long"),
        ({"segment_end": [3, 2**30, 9, 13]}, "empty or too long"),
        ({"segment_end": [3, 6, 9, 12]}, "end before or behind the words"),
        ({"segment_group": [0, -1, 2, 3]}, "a group that is not there"),
        ({"order": [-2] * 104}, "an input that is not there"),
        ({"codes": None}, "no codes"),
    ],
)
def test_the_library_checks_what_it_reads_by(change: dict[str, object], message: str) -> None:
    library = cpu.load_library()
    if isinstance(library, str):
        pytest.skip(library)
    whole = quantize(torch.randn(OUT, 128), QuantSpec(4, 32))
    blocks = BlockedWeight.of(whole.columns(torch.arange(101)), library)
    described = blocks.describe(library)
    assert described.columns == 104 and blocks.segment_end.tolist() == [4, 8, 12, 13]
    for field, value in change.items():
        if isinstance(value, list):
            value = (ctypes.c_int32 * len(value))(*value)
            change = {"kept": value}
            value = ctypes.addressof(value)
        setattr(described, field, value)
    with pytest.raises(HalveError, match=rf"a weight \[\d+, \d+\] is not one the C kernels can read: .*{message}"):
        library.check(described)


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
