"""Products of the decode step against the bandwidth of the GPU, and the search for the tile sizes they run best with.

Copies of a weight, together several times the second-level cache, are multiplied in turn inside one CUDA graph, so every
product comes from memory and launches cost what they cost in a decode step. On the CPU (to try the script) they are timed
one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halve.kernels import select, triton_backend
from halve.kernels.triton_backend import Fusion, Scratch, Tiling, TritonMatmul
from halve.kernels.triton_layout import Operand
from halve.measure.machine import bandwidth_gb_per_s
from halve.quantization import QuantizedWeight, QuantSpec, quantize

SHAPES = {
    "llama-3.2-3b": [(3072, 5120), (3072, 3072), (3072, 16384), (8192, 3072), (3072, 128256)],
    "llama-3.1-8b": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)],
    "tiny": [(256, 512), (512, 256)],
}
WEIGHTS: dict[str, QuantSpec | torch.dtype] = {
    "bf16": torch.bfloat16,
    "int8": QuantSpec(8, -1),
    "int4-g128": QuantSpec(4, 128),
}
CANDIDATES = [
    Tiling(rows, parts, warps, stages)
    for rows, warps in ((32, 4), (64, 2), (64, 4), (64, 8), (128, 2), (128, 4), (128, 8))
    for parts in (1, 2, 4, 8)
    for stages in (3, 5)
]
_CACHE_BYTES = 50 << 20  # second-level cache of an H100 or H200


def make_weight(kind: QuantSpec | torch.dtype, columns: int, rows: int, device: str) -> Tensor | QuantizedWeight:
    """A random weight [rows, columns]; codes are drawn directly, since their values do not change the time."""
    if isinstance(kind, torch.dtype):
        return torch.randn(rows, columns, device=device, dtype=kind)
    words = columns * kind.bits // 32
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32, device=device)
    groups = columns // kind.columns_per_group(columns)
    scale = torch.rand(rows, groups, device=device, dtype=torch.bfloat16)
    return QuantizedWeight(packed, scale, None, kind, columns)


def microseconds(calls: Sequence[Callable[[], object]], device: str, repeats: int = 10) -> float:
    """Time of one of `calls`, which run one after another: the least of `repeats` rounds."""
    for call in calls[:1]:
        call()
    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    torch.cuda.synchronize()
    graph, aside, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    try:
        with torch.cuda.stream(aside):  # not torch.cuda.graph, which collects garbage each time
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
    finally:
        torch.cuda.set_stream(current)
    best = float("inf")
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # while it runs the host launches the next, so that launching the graph is not in the time
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    del graph
    return best / len(calls) * 1e3


def copies_of(nbytes: int, device: str) -> int:
    """So many copies that together they are four times the cache, and at least 8, so that launches count as in a step."""
    return 2 if device == "cpu" else max(8, -(-4 * _CACHE_BYTES // nbytes))


@torch.inference_mode()
def measure_products(shape: str, counts: tuple[int, ...], device: str) -> Iterator[dict[str, Any]]:
    """One result per weight, shape, count of rows and kernel: ours, torch's own, and torch's packed int4 product."""
    backend = "triton" if triton_backend.runs_on(torch.device(device)) else "auto"
    for name, kind in WEIGHTS.items():
        for columns, rows in SHAPES[shape]:
            first = select(backend, make_weight(kind, columns, rows, device), torch.bfloat16)
            weight_bytes = first.weight.nbytes
            products = [first]
            for _ in range(copies_of(weight_bytes, device) - 1):
                products.append(select(backend, make_weight(kind, columns, rows, device), torch.bfloat16))
            for count in counts:
                x = torch.randn(count, columns, device=device).bfloat16()
                found = microseconds([lambda p=p, x=x: p(x) for p in products], device)
                yield result(name, first.kernel, columns, rows, count, weight_bytes, found)
                if isinstance(kind, torch.dtype):
                    weights = [p.weight for p in products]
                    calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]
                    yield result(name, "torch.linear", columns, rows, count, weight_bytes, microseconds(calls, device))
            del products, first
            if name == "int4-g128" and device != "cpu":
                yield from _torch_int4(columns, rows, counts, device)


def _torch_int4(columns: int, rows: int, counts: tuple[int, ...], device: str) -> Iterator[dict[str, Any]]:
    """`torch._weight_int4pack_mm`, groups of 128, the layout of gpt-fast and torchao."""
    bytes_each = rows * columns // 2 + rows * columns // 128 * 4
    weights = []
    for _ in range(copies_of(bytes_each, device)):
        codes = torch.randint(0, 255, (rows, columns // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // 128, rows, 2, device=device, dtype=torch.bfloat16)
        weights.append((packed, scales))
    for count in counts:
        x = torch.randn(count, columns, device=device).bfloat16()
        calls = [lambda w=w, s=s, x=x: torch.ops.aten._weight_int4pack_mm(x, w, 128, s) for w, s in weights]
        found = microseconds(calls, device)
        yield result("int4-g128", "torch._weight_int4pack_mm", columns, rows, count, bytes_each, found)


def result(
    weight: str, kernel: str, columns: int, rows: int, count: int, weight_bytes: int, time_us: float
) -> dict[str, Any]:
    return {
        "weight": weight, "kernel": kernel, "columns": columns, "rows": rows, "count": count, "weight_bytes": weight_bytes,
        "time_us": time_us, "gb_per_s": weight_bytes / time_us / 1e3,
    }  # fmt: skip


@torch.inference_mode()
def find_tilings(
    shape: str, device: str, known: Container[str], limit: int | None = None
) -> Iterator[tuple[str, Tiling, float, float]]:
    """For every product of a shape whose key is not `known`: the key, the fastest tiling, its time and that of the rule of
    thumb (microseconds). `limit`: how many candidates are tried."""
    scratch = Scratch(torch.device(device))
    for kind in WEIGHTS.values():
        for columns, rows in SHAPES[shape]:
            operands = [TritonMatmul(make_weight(kind, columns, rows, device), torch.bfloat16).operand]
            key = triton_backend.tiling_key(operands[0])
            if key in known:
                continue
            for _ in range(copies_of(operands[0].nbytes, device) - 1):
                operands.append(TritonMatmul(make_weight(kind, columns, rows, device), torch.bfloat16).operand)
            rule = triton_backend.tiling(operands[0])
            x = torch.randn(1, operands[0].stored_columns, device=device).bfloat16()
            wanted = torch.empty(1, rows, device=device, dtype=torch.bfloat16)
            triton_backend.multiply(operands[0], x, wanted, Fusion(), scratch, rule)
            timed = {t: _time(operands, x, wanted, t, device, scratch) for t in [rule, *CANDIDATES[:limit]]}
            best = min(timed, key=lambda t: timed[t])
            yield key, best, timed[best], timed[rule]


def _time(operands: list[Operand], x: Tensor, wanted: Tensor, sizes: Tiling, device: str, scratch: Scratch) -> float:
    """Microseconds of a product of one row with these tile sizes, infinity where they do not fit the GPU or are not right
    (`wanted`: the first operand's product with x)."""
    out = torch.empty_like(wanted)
    try:
        calls = [lambda o=o: triton_backend.multiply(o, x, out, Fusion(), scratch, sizes) for o in operands]
        calls[0]()
        error = float((out.float() - wanted.float()).norm() / wanted.float().norm())
        if not error < 0.01:
            raise ValueError(f"its product differs by {error:.1g}")
        return microseconds(calls, device, repeats=5)
    except Exception as error:  # Triton raises its own for too much shared memory or registers
        print(f"{sizes} does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return float("inf")


def bandwidths(device: str) -> dict[str, float]:
    """Copying (reads and writes counted) and, on a GPU, reading alone, in 10^9 bytes a second."""
    figures = {"copy" if device != "cpu" else "read": bandwidth_gb_per_s(device)}
    if device != "cpu":
        numbers = torch.ones(1 << 28, dtype=torch.float32, device=device)
        figures["read"] = numbers.nbytes / microseconds([numbers.sum], device) / 1e3
    return figures


def product_errors(device: str) -> Iterator[tuple[str, float]]:
    """What was multiplied and the relative error against float64, for odd shapes."""
    backend = "triton" if triton_backend.runs_on(torch.device(device)) else "auto"
    kinds = {
        **WEIGHTS, "int8-g128-asym": QuantSpec(8, 128, symmetric=False), "int4-g32-asym": QuantSpec(4, 32, symmetric=False),
        "int4-g128-ragged": QuantSpec(4, 128), "int2-g64": QuantSpec(2, 64),
    }  # fmt: skip
    for name, kind in kinds.items():
        numbers = torch.randn(37, 384, device=device)
        weight = numbers.to(kind) if isinstance(kind, torch.dtype) else quantize(numbers, kind)
        if name.endswith("ragged") and isinstance(weight, QuantizedWeight):
            weight = weight.columns(torch.arange(0, 384, 3, device=device))
        exact = weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()
        multiply = select(backend, weight, torch.bfloat16)
        for count in (1, 2, 16, 40):
            x = torch.randn(count, weight.shape[1], device=device).bfloat16()
            wanted = x.double() @ exact.t()
            yield f"{name}, {count} rows", float((multiply(x).double() - wanted).norm() / wanted.norm())
            if count <= triton_backend.MAX_ROWS and isinstance(multiply, TritonMatmul):
                operand, out = multiply.operand, torch.empty(count, weight.shape[0], device=device, dtype=x.dtype)
                sizes, scratch = Tiling(64, operand.segments), Scratch(torch.device(device))
                triton_backend.multiply(operand, operand.arranged(x).contiguous(), out, Fusion(), scratch, sizes)
                yield f"{name}, {count} rows, split", float((out.double() - wanted).norm() / wanted.norm())
