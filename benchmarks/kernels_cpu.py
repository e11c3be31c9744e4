"""Memory traffic of the CPU kernels beside the read bandwidth of the machine, measured in turn in one run.

    python benchmarks/kernels_cpu.py [--threads 2] [--weights int4-g128,bf16] [--out RECORD.json]

Each weight is repeated until the copies exceed the last-level cache several times over, and copies are read in turn, so
that every product comes from memory. The figure is the bytes of the weight as held (scales and zero points included)
over the best time; `share` is that over the best bandwidth seen in the run. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from halve.kernels import select
from halve.measure.machine import bandwidth_gb_per_s, last_level_cache_bytes
from halve.measure.records import new_record, write_record
from halve.quantization import QuantizedWeight, QuantSpec

SHAPES = ((2048, 8192), (2048, 2048), (8192, 2048), (2048, 128256))
WEIGHTS: dict[str, QuantSpec | torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": QuantSpec(8, -1),
    "int8-g128": QuantSpec(8, 128),
    "int4-g128": QuantSpec(4, 128),
    "int4-g32": QuantSpec(4, 32),
    "int4-g128-asym": QuantSpec(4, 128, symmetric=False),
}


def make_weight(kind: QuantSpec | torch.dtype, columns: int, rows: int) -> torch.Tensor | QuantizedWeight:
    """A random weight [rows, columns]; codes are drawn directly, since their values do not change the time."""
    if isinstance(kind, torch.dtype):
        return torch.randn(rows, columns).to(kind)
    packed = torch.randint(-(2**31), 2**31, (rows, -(-columns * kind.bits // 32)), dtype=torch.int64).to(torch.int32)
    groups = columns // kind.columns_per_group(columns)
    scale = torch.rand(rows, groups).bfloat16()
    zero = None if kind.symmetric else torch.randint(kind.qmin, kind.qmax, (rows, groups), dtype=torch.int8)
    return QuantizedWeight(packed, scale, zero, kind, columns)


@torch.inference_mode()
def measure(
    kind: QuantSpec | torch.dtype, columns: int, rows: int, counts: list[int], repeats: int, backend: str
) -> list[dict[str, Any]]:
    """One result per count of rows of x."""
    weight = make_weight(kind, columns, rows)
    copies = max(1, -(-4 * last_level_cache_bytes() // weight.nbytes))
    products = [select(backend, weight, torch.bfloat16)]
    for _ in range(copies - 1):
        products.append(select(backend, make_weight(kind, columns, rows), torch.bfloat16))
    held = products[0].weight.nbytes
    del weight
    results = []
    for count in counts:
        x, best = torch.randn(count, columns).bfloat16(), float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            for product in products:
                product(x)
            best = min(best, (time.perf_counter() - start) / copies)
        gb_per_s = held / best / 1e9
        results.append({
            "kernel": products[0].kernel, "columns": columns, "rows": rows, "count": count,
            "weight_bytes": held, "time_us": best * 1e6, "gb_per_s": gb_per_s,
        })  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="comma-separated: " + ", ".join(WEIGHTS))
    parser.add_argument("--counts", default="1", help="rows of x, comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backend", default="cpu", help="cpu, or reference for torch's own ops")
    parser.add_argument("--max-rows", type=int, default=1 << 30, help="leave out shapes with more output rows")
    parser.add_argument("--out", help="write a record here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = [int(count) for count in arguments.counts.split(",")]
    results, bandwidth = [], bandwidth_gb_per_s("cpu")
    for name in arguments.weights.split(","):
        for columns, rows in SHAPES:
            if rows > arguments.max_rows:
                continue
            found = measure(WEIGHTS[name], columns, rows, counts, arguments.repeats, arguments.backend)
            results += [{"weight": name, **result} for result in found]
        bandwidth = max(bandwidth, bandwidth_gb_per_s("cpu"))
    for result in results:
        result["share"] = result["gb_per_s"] / bandwidth
        print(
            f"{result['weight']:15} {result['kernel']:15} {result['columns']:5} -> {result['rows']:6}"
            f"  M = {result['count']:3}  {result['time_us']:9.1f} us  {result['gb_per_s']:5.1f} GB/s"
            f"  {100 * result['share']:3.0f} % of {bandwidth:.1f} GB/s"
        )
    body = {"threads": arguments.threads, "bandwidth_gb_per_s": bandwidth, "results": results}
    if arguments.out:
        write_record(arguments.out, new_record("kernels", "random weights", recipe=[], **body))
    print(json.dumps(body))


if __name__ == "__main__":
    main()
