"""What Triton's compiler makes of the kernels, run on the CPU (`benchmarks/ptx_emulate.py`). Not collected by itself: Triton is
to be imported with TRITON_INTERPRET=0, so `test_compiled.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halve.kernels import triton_backend as backend
from halve.kernels.triton_backend import Fusion, NormedInput, Scratch, Tiling, TritonMatmul
from halve.kernels.triton_layout import packed_operand
from halve.measure.speed.timed_model import Placement
from halve.quantization import QuantizedWeight, QuantSpec, quantize
from tests.common import relative
from tools.gpu.models import step_error
from tools.gpu.steps import ROWS_3B
from tools.ptx import compile as ptx_compile
from tools.ptx import emulate as ptx_emulate
from tools.ptx.cpu import cpu_too

ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WEIGHTS = {**ptx_compile.WEIGHTS, "int3-g64": QuantSpec(3, 64)}
ptx_emulate.emulate()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "runs_on", cpu_too)
    yield


def make(name: str, dtype: torch.dtype) -> tuple[TritonMatmul, Tensor]:
    """A weight of 70 rows as a kernel holds it, and its numbers."""
    torch.manual_seed(0)
    spec, numbers = WEIGHTS[name], torch.randn(70, 384)
    weight: Tensor | QuantizedWeight
    weight = quantize(numbers, spec) if isinstance(spec, QuantSpec) else numbers.to(dtype)
    if name.endswith("ragged") and isinstance(weight, QuantizedWeight):
        weight = weight.columns(torch.arange(0, 384, 2))
    return TritonMatmul(weight, dtype), weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()


@pytest.mark.parametrize("name", WEIGHTS)
def test_products(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16) if name in ("bf16", "int8", "int4-g128") else (torch.bfloat16,):
        multiply, exact = make(name, dtype)
        operand = multiply.operand
        for count, sizes in ((1, Tiling(64)), (3, Tiling(32, 2, 4, 3)), (1, Tiling(128, 2, 8, 5))):
            x, out = torch.randn(count, operand.columns).to(dtype), torch.zeros(count, 70, dtype=dtype)
            scratch = Scratch(torch.device("cpu"))
            backend.multiply(operand, operand.arranged(x).contiguous(), out, Fusion(), scratch, sizes)
            assert relative(out, x.double() @ exact.T) < ROUNDED[dtype], (dtype, count, sizes)
            assert not scratch.arrived.any()


@pytest.mark.parametrize("name", ["int8-g128-asym", "int4-g128", "int4-g128-ragged"])
def test_prefill_expands(name: str) -> None:
    multiply, exact = make(name, torch.float32)
    x = torch.randn(20, multiply.operand.columns)
    assert relative(multiply(x), x.double() @ exact.T) < 1e-5


def test_a_product_feeds_the_next() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(rows, columns).bfloat16() for rows, columns in ((256, 128), (70, 256)))
    maker, reader = (TritonMatmul(w, torch.bfloat16).operand for w in (first, second))
    gain, stream, x = torch.rand(256).bfloat16(), torch.randn(1, 256).bfloat16(), torch.randn(1, 128).bfloat16()
    made = stream.double() + x.double() @ first.double().T
    scratch, sizes = Scratch(torch.device("cpu")), Tiling(64)
    feed = NormedInput(torch.zeros(1, 256, dtype=torch.bfloat16), None, gain, torch.zeros(1, 4), 1e-5)
    backend.multiply(maker, x, stream, Fusion(epilogue=1, next_input=feed), scratch, sizes)
    assert relative(stream, made) < ROUNDED[torch.bfloat16]
    out = torch.zeros(1, 70, dtype=torch.bfloat16)
    backend.multiply(reader, feed.vectors, out, Fusion(norm=feed), scratch, sizes)
    normed = made / (made.square().mean() + 1e-5).sqrt() * gain.double()
    assert relative(out, normed @ second.double().T) < 2 * ROUNDED[torch.bfloat16]


@pytest.mark.parametrize("overlapped", ["0", "1"])
def test_a_decode_step(overlapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned 4-bit model after 200 tokens: norms, gathers, attention in stretches, head; also as launches that overlap."""
    monkeypatch.setenv("HALVE_PDL", overlapped)
    row = next(row for row in ROWS_3B if row.name == "3b-int4-head8-inputs-10")
    with torch.inference_mode():
        placement = Placement("cpu", torch.bfloat16, "triton", random_weights=True)
        found, kernel = step_error(replace(row, shape="tiny", kept_inputs=0.5, head_kept=0.5), placement, steps=1)
    assert found < 0.02 and kernel == "fused kernels"


def test_the_order_of_blocks_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split columns and split attention are added up in their own order, whichever part arrives last."""
    operand = make("int4-g128", torch.bfloat16)[0].operand
    x, outs = torch.randn(2, 384).bfloat16(), []
    qkv, keys, values = torch.randn(1, 5 * 64), torch.randn(1, 1, 256, 64), torch.randn(1, 1, 256, 64)
    where, tables = torch.tensor([230], dtype=torch.int32), torch.ones(256, 64)
    for backwards in (False, True):
        monkeypatch.setattr(ptx_emulate, "BACKWARDS", backwards)
        out, heads, scratch = torch.zeros(2, 70, dtype=x.dtype), torch.zeros(1, 3 * 64), Scratch(torch.device("cpu"))
        backend.multiply(operand, x, out, Fusion(), scratch, Tiling(32, 3))
        partial, stats, arrived = torch.empty(16 * 16 * 64), torch.empty(16 * 32), torch.zeros(1, dtype=torch.int32)
        attention = backend.load_kernels("triton_attention")
        attention.attend[(1, 16)](
            qkv, qkv, qkv, tables, tables, keys, values, where, heads, heads, partial, stats, arrived, 3, 1, 64, 256, 0, 320,
            192, 0.0, 0.125, QK_NORM=False, PLACED=False, HEADS_A_GROUP=3, R=16, D=64, S=64, SPLITS=16, SHORTEST=64,
            PLAIN=False, **backend.launch_options(4),
        )  # fmt: skip
        assert not arrived.any() and not scratch.arrived.any()
        outs.append((out, heads))
    assert all(torch.equal(first, second) for first, second in zip(*outs, strict=True))


def test_reading_past_a_tensor_is_found() -> None:
    operand = packed_operand(quantize(torch.randn(70, 384), QuantSpec(4, 128)))
    short = replace(operand, data=operand.data[:-1].clone())
    x, out = torch.randn(1, 384).bfloat16(), torch.zeros(1, 70, dtype=torch.bfloat16)
    with pytest.raises(IndexError, match="in no tensor of the launch"):
        backend.multiply(short, x, out, Fusion(), Scratch(torch.device("cpu")), Tiling(64))
