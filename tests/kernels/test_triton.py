"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter's products of bfloat16 tiles are wrong (its own defect), so that several rows of x are bfloat16 on a GPU only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")

from halve import kernels
from halve.errors import HalveError
from halve.kernels import triton_backend as backend
from halve.kernels.triton_backend import Fusion, Scratch, SegmentedWeight, Tiling, TritonMatmul
from halve.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = 37  # odd: no whole number of tiles
SMALL = Tiling(16, 128)

# float32 sums of some hundred products; packed codes of one row of x are carried as 1 + code / 2^bits, whose sum is three
# times that of code / 2^bits, and with zero points at the end of the range 20 times: 24 bits less 5 for that and for order
FP32_ERROR = 4e-6
# rounding y to 8 or 11 significant bits, and for more rows the weights and x * gain as well: three roundings at most
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors on the CPU through, and use tiles of a size the interpreter is quick with."""
    if DEVICE == "cpu":
        monkeypatch.setattr(backend, "INTERPRETED", True)
        monkeypatch.setattr(backend, "tiling", lambda operand, count: SMALL)
    yield


def dtypes(rows: int) -> list[torch.dtype]:
    """What x may be for a number of rows."""
    halves = [torch.bfloat16, torch.float16] if DEVICE == "cuda" or rows == 1 else [torch.float16]
    return [torch.float32, *halves]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(
    weight: Tensor | QuantizedWeight, numbers: Tensor, dtype: torch.dtype, rows: tuple[int, ...] = (1, 2, 16)
) -> None:
    """The product with `weight`, whose numbers are known."""
    held = weight.to(DEVICE)
    multiply = kernels.select("triton", held, dtype)
    for count in rows:
        x = torch.randn(count, weight.shape[1]).to(dtype)
        y = multiply(x.to(DEVICE)).cpu()
        assert y.dtype == dtype and y.shape == (count, weight.shape[0])
        assert relative_error(y, x.double() @ numbers.double().T) < FP32_ERROR + ROUNDED[dtype], (count, dtype)


@pytest.mark.parametrize("columns", [19, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(OUT, columns).to(dtype)
    check(weight, weight, dtype, tuple(n for n in (1, 2, 16, 19) if dtype in dtypes(n) or n > 16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 64), (2, -1), (3, 32), (4, -1), (4, 10), (4, 32), (4, 128), (8, -1), (8, 10), (8, 128)]
)
def test_packed(bits: int, group_size: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    columns = 250 if group_size in (10, -1) else 384
    weight = quantize(torch.randn(OUT, columns), QuantSpec(bits, group_size, symmetric))
    check(weight, weight.dequantize(), torch.float32, (1, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUT, 256), QuantSpec(4, 64, symmetric=False), dtype)
    check(weight, weight.dequantize(), dtype, tuple(n for n in (1, 2, 19) if dtype in dtypes(n) or n > 16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ragged_groups(bits: int) -> None:
    torch.manual_seed(0)
    whole = quantize(torch.randn(OUT, 384), QuantSpec(bits, 64, symmetric=False))
    for columns in (torch.randperm(384)[:251].sort().values, torch.randperm(384)[:251]):
        check(whole.columns(columns), whole.dequantize()[:, columns], torch.float32, (1, 2, 19))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stored_form_can_be_had_back(bits: int) -> None:
    torch.manual_seed(0)
    whole = quantize(torch.randn(OUT, 256), QuantSpec(bits, 32, symmetric=False), torch.bfloat16)
    for weight in (
        whole,
        whole.columns(torch.randperm(256)[:101]),
        quantize(torch.randn(OUT, 70), QuantSpec(bits, -1)),
    ):
        held = TritonMatmul(weight.to(DEVICE), torch.float32).weight
        assert isinstance(held, SegmentedWeight) and held.shape == weight.shape
        assert torch.equal(held.packed.cpu(), weight.packed)
        assert torch.equal(held.dequantize().cpu(), weight.dequantize())


def test_a_weight_is_held_once_and_padding_is_small() -> None:
    whole = quantize(torch.randn(512, 2048), QuantSpec(4, 128), torch.bfloat16)
    layer = Linear(whole.to(DEVICE))
    assert layer.select_backend("triton", torch.bfloat16) == "triton-int4"
    assert layer.nbytes == whole.nbytes
    # a tenth of the inputs pruned: groups are filled up to whole words of 8 codes, so memory still goes down
    pruned = Linear(whole.columns(torch.randperm(2048)[:1843].sort().values).to(DEVICE))
    pruned.select_backend("triton", torch.bfloat16)
    assert pruned.nbytes < 0.98 * layer.nbytes


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("spec", [None, QuantSpec(4, 32), QuantSpec(8, -1)])
def test_everything_around_a_product(spec: QuantSpec | None, count: int) -> None:
    """Norm, gather of kept inputs, bias, kept outputs, residual and the tiles' best, in parts and whole."""
    torch.manual_seed(0)
    width, kept = 160, torch.randperm(160)[:96].sort().values
    numbers = torch.randn(OUT, 96)
    weight: Tensor | QuantizedWeight = numbers
    if spec is not None:
        weight = quantize(numbers, spec)
        numbers = weight.dequantize()
    operand = TritonMatmul(weight.to(DEVICE), torch.float32).operand
    x, gain, bias = torch.randn(count, width), torch.rand(width) + 0.5, torch.randn(OUT)
    stream, place = torch.randn(count, 50), torch.randperm(50)[:OUT]
    normalised = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain
    product = normalised.double()[:, kept] @ numbers.double().T + bias.double()
    expected = stream.double().index_add(1, place, product)
    for parts in (1, 2):
        sizes = Tiling(16, 32, parts)
        tiles = -(-OUT // 16)
        best, best_row = (
            torch.zeros(count, tiles, device=DEVICE),
            torch.zeros(count, tiles, dtype=torch.int32, device=DEVICE),
        )
        fusion = Fusion(
            index=operand.index(kept.to(DEVICE)),
            gain=gain.to(DEVICE),
            eps=1e-5,
            bias=bias.to(DEVICE),
            place=place.to(DEVICE, torch.int32),
            epilogue=1,
            best=best,
            best_row=best_row,
        )
        out, scratch = stream.clone().to(DEVICE), Scratch(torch.device(DEVICE))
        backend.multiply(operand, x.to(DEVICE), out, fusion, scratch, sizes)
        assert relative_error(out.cpu(), expected) < FP32_ERROR
        assert not scratch.arrived.any()  # counters are back at 0 for the next launch
        written = expected[:, place]
        for tile in range(tiles):
            value, where = written[:, tile * 16 : tile * 16 + 16].max(1)
            assert torch.equal(best_row[:, tile].cpu().long(), place[tile * 16 + where])
            assert torch.allclose(best[:, tile].cpu().double(), value, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_gates(count: int, activation: str) -> None:
    from halve.cuda_decode import ACTIVATIONS as NUMBERS
    from halve.model import ACTIVATIONS

    torch.manual_seed(0)
    weight, x = torch.randn(2 * 21, 48), torch.randn(count, 48)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = ACTIVATIONS[activation](gate) * up
    operand, scratch = TritonMatmul(weight.to(DEVICE), torch.float32).operand, Scratch(torch.device(DEVICE))
    out = torch.zeros(count, 21, device=DEVICE)
    both = Fusion(epilogue=2, activation=NUMBERS[activation])
    backend.multiply(operand, x.to(DEVICE), out, both, scratch, SMALL)
    assert relative_error(out.cpu(), expected) < FP32_ERROR
    halves = [TritonMatmul(half.to(DEVICE), torch.float32).operand for half in weight.chunk(2)]
    first, second = torch.zeros(count, 21, device=DEVICE), torch.zeros(count, 21, device=DEVICE)
    backend.multiply(halves[0], x.to(DEVICE), first, Fusion(), scratch, SMALL)
    times = Fusion(epilogue=3, activation=NUMBERS[activation], gate=first)
    backend.multiply(halves[1], x.to(DEVICE), second, times, scratch, SMALL)
    assert relative_error(second.cpu(), expected) < FP32_ERROR


def test_many_rows_of_a_packed_weight_go_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_TILE_BYTES", 4 * 384 * 16)  # 16 of the 37 rows, 16, then 5
    weight = quantize(torch.randn(OUT, 333), QuantSpec(4, -1))  # padded to 384 columns
    check(weight, weight.dequantize(), torch.float32, (40,))
    multiply = TritonMatmul(weight.to(DEVICE), torch.float32)
    assert multiply.prefill_kernel == "triton-expand + torch.matmul"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(HalveError, match="triton: the weight is on cpu"):
        kernels.select("triton", torch.randn(4, 4), torch.float32)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with pytest.raises(HalveError, match=r"float16, not torch\.float64"):
        kernels.select("triton", torch.randn(4, 4), torch.float64)


def test_tilings_measured_elsewhere_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    operand = backend.dense_operand(torch.empty(8, 64))
    path = tmp_path / "tilings.json"
    path.write_text(json.dumps({"tilings": {"16bit-64x8-m1": [2, 256, 1, 8, 2]}}))
    monkeypatch.setenv("HALVE_TRITON_TUNED", str(path))
    backend._measured.cache_clear()
    try:
        assert backend.tiling(operand, 1) == Tiling(2, 256, 1, 8, 2)
        assert backend.tiling(operand, 2).rows == 32  # no figure for several rows: the rule
    finally:
        backend._measured.cache_clear()


def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """The interpreter takes what the compiler may refuse; ptxas comes with Triton."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_compile.py"
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA GPUs")
    done = subprocess.run(
        [sys.executable, str(script), "--only", "ragged,attention"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
    products = [row for row in rows if row["kernel"].startswith("int4") and "expand" not in row["kernel"]]
    assert products and all(row["weight_load_bits"] == 128 for row in products)
