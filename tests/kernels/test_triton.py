"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter's products of bfloat16 tiles are wrong (its own defect) and it has no assembly, so that there the kernels
multiply in float32; what they load, round and store is bfloat16 all the same.
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
from halve.kernels.triton_backend import Fusion, NormedInput, Scratch, Tiling, TritonMatmul
from halve.kernels.triton_layout import SegmentedWeight, dense_operand
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, quantize
from tests.common import relative
from tools.ptx.cpu import cpu_too

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = 37  # odd: no whole number of tiles
SMALL = Tiling(16)
RUNS_ON = backend.runs_on
FP32_ERROR = 1e-6  # float32 sums of some hundred products
# rounding y to 8 or 11 significant bits
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors on the CPU through, and use tiles of a size the interpreter is quick with."""
    if DEVICE == "cpu":
        monkeypatch.setattr(backend, "runs_on", cpu_too)
        monkeypatch.setattr(backend, "tiling", lambda operand: SMALL)
    yield


def check(
    weight: Tensor | QuantizedWeight, numbers: Tensor, dtype: torch.dtype, rows: tuple[int, ...] = (1, 2, 16)
) -> None:
    """The product with `weight`, whose numbers are known."""
    on_device = weight.to(DEVICE)
    multiply = kernels.select("triton", on_device, dtype)
    for count in rows:
        x = torch.randn(count, weight.shape[1]).to(dtype)
        y = multiply(x.to(DEVICE)).cpu()
        assert y.dtype == dtype and y.shape == (count, weight.shape[0])
        roundings = 1 if count <= backend.MAX_ROWS else 2  # prefill rounds the weights too
        error = relative(y, x.double() @ numbers.double().T)
        assert error < FP32_ERROR + roundings * ROUNDED[dtype], (count, dtype)


@pytest.mark.parametrize("columns", [19, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(OUT, columns).to(dtype)
    check(weight, weight, dtype, (1, 2, 16, 19))


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
    check(weight, weight.dequantize(), dtype, (1, 2, 19))


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
        prepared = TritonMatmul(weight.to(DEVICE), torch.float32).weight
        assert isinstance(prepared, SegmentedWeight) and prepared.shape == weight.shape
        stored = prepared.stored()
        assert torch.equal(stored.packed.cpu(), weight.packed) and torch.equal(stored.scale.cpu(), weight.scale)
        assert (stored.zero is None) == (weight.zero is None)
        assert torch.equal(prepared.dequantize().cpu(), weight.dequantize())


def test_a_weight_is_held_once_and_padding_is_small() -> None:
    whole = quantize(torch.randn(512, 2048), QuantSpec(4, 128), torch.bfloat16)
    layer = Linear(whole.to(DEVICE))
    assert layer.select_backend("triton", torch.bfloat16) == "triton-int4"
    assert layer.nbytes == whole.nbytes
    # a tenth of the inputs pruned: groups are filled up to multiples of 8 columns, so memory still goes down
    pruned = Linear(whole.columns(torch.randperm(2048)[:1843].sort().values).to(DEVICE))
    pruned.select_backend("triton", torch.bfloat16)
    assert pruned.nbytes < 0.98 * layer.nbytes


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("spec", [None, QuantSpec(4, 32), QuantSpec(8, -1)])
def test_everything_around_a_product(spec: QuantSpec | None, count: int) -> None:
    """Bias, kept outputs, residual and the tiles' best, in parts and whole."""
    torch.manual_seed(0)
    numbers = torch.randn(OUT, 300)
    weight: Tensor | QuantizedWeight = numbers[:, :288]
    if spec is not None:
        weight = quantize(numbers[:, :288], spec)
    exact = weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()
    operand = TritonMatmul(weight.to(DEVICE), torch.float32).operand
    x, bias = torch.randn(count, 288), torch.randn(OUT)
    stream, place = torch.randn(count, 50), torch.randperm(50)[:OUT]
    expected = stream.double().index_add(1, place, x.double() @ exact.T + bias.double())
    for parts in (1, 2):
        sizes = Tiling(16, parts)
        tiles = -(-OUT // 16)
        best = torch.zeros(count, tiles, device=DEVICE)
        best_row = torch.zeros(count, tiles, dtype=torch.int32, device=DEVICE)
        fusion = Fusion(
            bias=bias.to(DEVICE), place=place.to(DEVICE, torch.int32), epilogue=1, best=best, best_row=best_row
        )
        out, scratch = stream.clone().to(DEVICE), Scratch(torch.device(DEVICE))
        backend.multiply(operand, operand.arranged(x.to(DEVICE)), out, fusion, scratch, sizes)
        assert relative(out.cpu(), expected) < FP32_ERROR
        assert not scratch.arrived.any()  # counters are back at 0 for the next launch
        written = expected[:, place]
        for tile in range(tiles):
            value, where = written[:, tile * 16 : tile * 16 + 16].max(1)
            assert torch.equal(best_row[:, tile].cpu().long(), place[tile * 16 + where])
            assert torch.allclose(best[:, tile].cpu().double(), value, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_product_feeds_the_next_ones(ragged: bool, count: int) -> None:
    """What is added to the residual stream reaches readers behind a norm, each its kept inputs in its own order."""
    torch.manual_seed(0)
    width, first = 100, torch.randn(100, 64)
    second = [torch.randn(OUT, 96), torch.randn(20, 40)]
    kept = [torch.randperm(width)[:96].sort().values, torch.randperm(width)[:40].sort().values]
    weights: list[Tensor | QuantizedWeight] = list(second)
    if ragged:
        whole = [quantize(torch.randn(w.shape[0], width), QuantSpec(4, 20)) for w in second]
        weights = [q.columns(k) for q, k in zip(whole, kept, strict=True)]
        second = [q.dequantize()[:, k] for q, k in zip(whole, kept, strict=True)]
    gain, stream, x = torch.rand(width) + 0.5, torch.randn(count, width), torch.randn(count, 64)
    operands = [TritonMatmul(w.to(DEVICE), torch.float32).operand for w in weights]
    widths = [o.stored_columns for o in operands]
    tables = [o.places(k.to(DEVICE), width) for o, k in zip(operands, kept, strict=True)]
    assert tables[0] is not None and tables[1] is not None
    table = torch.stack([tables[0], torch.where(tables[1] >= 0, tables[1] + widths[0], -1)]).to(torch.int32)
    vectors, scratch = torch.zeros(count, sum(widths), device=DEVICE), Scratch(torch.device(DEVICE))
    out, maker = stream.clone().to(DEVICE), TritonMatmul(first.to(DEVICE), torch.float32).operand
    made = stream.double() + x.double() @ first.double().T
    normed = made / (made.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain
    squares = torch.zeros(count, -(-width // 16), device=DEVICE)
    feed = NormedInput(vectors, table, gain.to(DEVICE), squares, 1e-5)
    backend.multiply(maker, maker.arranged(x.to(DEVICE)), out, Fusion(epilogue=1, next_input=feed), scratch, SMALL)
    again = NormedInput(torch.zeros_like(vectors), table, gain.to(DEVICE), torch.zeros(count, 1, device=DEVICE), 1e-5)
    backend.write_normed_input(out, None, out, again)
    assert torch.equal(again.vectors, vectors) and torch.allclose(again.squares.sum(1), squares.sum(1))
    for o, view, k, numbers in zip(operands, vectors.split(widths, dim=1), kept, second, strict=True):
        y = torch.zeros(count, o.rows, device=DEVICE)
        backend.multiply(o, view, y, Fusion(norm=feed), scratch, SMALL)
        assert relative(y.cpu(), normed[:, k] @ numbers.double().T) < FP32_ERROR


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_gates(count: int, activation: str) -> None:
    from halve.decode.gpu_launches import ACTIVATIONS as NUMBERS
    from halve.model.decoder import ACTIVATIONS

    torch.manual_seed(0)
    weight, x = torch.randn(2 * 21, 48), torch.randn(count, 48)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = ACTIVATIONS[activation](gate) * up
    operand, scratch = TritonMatmul(weight.to(DEVICE), torch.float32).operand, Scratch(torch.device(DEVICE))
    out, x_there = torch.zeros(count, 21, device=DEVICE), operand.arranged(x.to(DEVICE))
    both = Fusion(epilogue=2, activation=NUMBERS[activation])
    backend.multiply(operand, x_there, out, both, scratch, SMALL)
    assert relative(out.cpu(), expected) < FP32_ERROR
    halves = [TritonMatmul(half.to(DEVICE), torch.float32).operand for half in weight.chunk(2)]
    first, second = torch.zeros(count, 21, device=DEVICE), torch.zeros(count, 21, device=DEVICE)
    backend.multiply(halves[0], x_there, first, Fusion(), scratch, SMALL)
    times = Fusion(epilogue=3, activation=NUMBERS[activation], gate=first)
    backend.multiply(halves[1], x_there, second, times, scratch, SMALL)
    assert relative(second.cpu(), expected) < FP32_ERROR


def test_many_rows_of_a_packed_weight_go_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_TILE_BYTES", 4 * 384 * 16)  # 16 of the 37 rows, 16, then 5
    weight = quantize(torch.randn(OUT, 333), QuantSpec(4, -1))  # padded to 384 columns
    check(weight, weight.dequantize(), torch.float32, (40,))


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as as_shipped:
        as_shipped.setattr(backend, "runs_on", RUNS_ON)
        with pytest.raises(HalveError, match="triton: the weight is on cpu"):
            kernels.select("triton", torch.randn(4, 4), torch.float32)
    with pytest.raises(HalveError, match=r"float16, not torch\.float64"):
        kernels.select("triton", torch.randn(4, 4), torch.float64)


def test_tilings_measured_elsewhere_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    operand = dense_operand(torch.empty(8, 64))
    path = tmp_path / "tilings.json"
    path.write_text(json.dumps({"tilings": {"16bit-64x8": [32, 2, 8, 3]}}))
    monkeypatch.setenv("HALVE_TRITON_TUNED", str(path))
    backend._measured.cache_clear()
    try:
        assert backend.tiling(operand) == Tiling(32, 2, 8, 3)
        assert backend.tiling(dense_operand(torch.empty(6, 60))) == Tiling(32, 2, 8, 3)  # a pruned one
        assert backend.tiling(dense_operand(torch.empty(17, 64))).rows == 64  # no figure: the rule
        for bad in ("[]", "{", '{"tilings": {"16bit-64x8": 3}}'):
            path.write_text(bad)
            backend._measured.cache_clear()
            with pytest.raises(
                HalveError, match=r"HALVE_TRITON_TUNED=.* is no file of tilings .*: unset it, or make one"
            ):
                backend.tiling(operand)
    finally:
        backend._measured.cache_clear()


def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """The interpreter takes what the compiler may refuse; ptxas comes with Triton."""
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA GPUs")
    done = subprocess.run(
        [sys.executable, "-m", "tools.ptx.compile", "--only", "int4-g128,attention"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
    products = [row for row in rows if "copy_bits" in row]
    assert products and all(row["copy_bits"] == 128 for row in products)
    # of 3.35 TB/s an H100 has time for 4.4 instructions a 4-bit weight: more, and issuing them is what takes the time
    assert all(row["instructions_a_weight"] < 3 for row in products)
