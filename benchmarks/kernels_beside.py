"""The CPU kernels of another version of this package and of this one, product by product in turn.

    python benchmarks/kernels_beside.py OTHER_CHECKOUT [--rounds 9] [--out RECORD.json]

A process for each version holds the same weights, more of them than fit into the last-level cache; they take turns, so that
what else happens on the machine happens to both. `before_us` and `after_us` are the fastest product of all rounds, `ratio`
is the median over the rounds of the fastest after over the fastest before. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernels_cpu import WEIGHTS, make_weight

from halve.checkpoint.reader import DTYPES
from halve.kernels import select
from halve.measure.machine import last_level_cache_bytes
from halve.measure.records import new_record, source_commit, write_record

SHAPES = ((2048, 8192), (8192, 2048))
# dtype, rows of x, and how many of 128 numbers of x are 10^4 times as large
INPUTS = (("bf16", 1, 0), ("bf16", 1, 1), ("bf16", 1, 8), ("bf16", 8, 0), ("fp32", 1, 0))


class Worker:
    """A process that runs the kernels of one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        command = [sys.executable, __file__, "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Any) -> Any:
        """What the process answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@torch.inference_mode()
def work() -> None:
    """Answer requests: None with the commit, others with the time of the fastest product in microseconds."""
    products, held = [], None
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            print(json.dumps(source_commit()), flush=True)
            continue
        weight, columns, rows, dtype, count, outliers = request
        if held != request[:4]:
            products.clear()
            made = [make_weight(WEIGHTS[weight], columns, rows)]
            made *= max(1, -(-2 * last_level_cache_bytes() // made[0].nbytes))
            products += [select("cpu", one, DTYPES[dtype]) for one in made]
            held = request[:4]
        x = torch.randn(count, columns)
        x.view(count, -1, 128)[:, :, :outliers] *= 1e4
        x, best = x.to(DTYPES[dtype]), float("inf")
        for _ in range(3):
            for product in products:
                start = time.perf_counter()
                product(x)
                best = min(best, time.perf_counter() - start)
        print(json.dumps(best * 1e6), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout whose kernels are built")
    parser.add_argument("--weights", default="int8,int4-g128", help="comma-separated: " + ", ".join(WEIGHTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="write a record here")
    arguments = parser.parse_args()
    before, after = Worker(arguments.other), Worker(Path(__file__).resolve().parents[1])
    results = []
    for name in arguments.weights.split(","):
        for (columns, rows), (dtype, count, outliers) in [(shape, given) for shape in SHAPES for given in INPUTS]:
            request = [name, columns, rows, dtype, count, outliers]
            pairs = [(before.ask(request), after.ask(request)) for _ in range(arguments.rounds)]
            results.append({
                "weight": name, "columns": columns, "rows": rows, "dtype": dtype, "count": count, "outliers": outliers,
                "before_us": min(old for old, _ in pairs), "after_us": min(new for _, new in pairs),
                "ratio": statistics.median(new / old for old, new in pairs),
            })  # fmt: skip
            print(
                " ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in results[-1].values())
            )
    body = {
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "before": before.ask(None),
        "results": results,
    }
    if arguments.out:
        record = new_record("kernels", "random weights", recipe=[], **body)
        write_record(arguments.out, record | {"command": record["command"].replace(str(arguments.other), "OTHER")})
    print(json.dumps(body))


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()
