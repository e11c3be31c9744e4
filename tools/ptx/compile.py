"""Compile the Triton kernels for a GPU that is not there, and say what ptxas made of them.

    python -m tools.ptx.compile [--capability 90] [--only bf16,attention] [--out RECORD.json]

Needs Triton and no GPU. For each variant that a decode step launches: registers a thread, bytes of local memory (spills:
a few at most), shared memory, how wide a product copies its weight (128 bits where all is well) and instructions that its
loop takes for one weight: a multiprocessor issues 128 a cycle to its threads, which bounds weights a second. Exits with 1
where one spills more than a few bytes. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.runtime import driver  # pyright: ignore[reportMissingImports]
from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

from halve.kernels import triton_backend as backend
from halve.kernels.triton_backend import Fusion, NormedInput, Scratch
from halve.kernels.triton_layout import Operand, dense_operand, packed_operand
from halve.measure.records import new_record, write_record
from halve.quantization import QuantizedWeight, QuantSpec

TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
COLUMNS, ROWS = 3072, 5120  # q/k/v of the Llama-3.2-3B shape
WEIGHTS: dict[str, QuantSpec | torch.dtype] = {
    "bf16": torch.bfloat16,
    "int8": QuantSpec(8, -1),
    "int8-g128-asym": QuantSpec(8, 128, symmetric=False),
    "int4-g128": QuantSpec(4, 128),
    "int4-g128-asym": QuantSpec(4, 128, symmetric=False),
    "int4-g128-ragged": QuantSpec(4, 128),
    "int4-g32": QuantSpec(4, 32),
    "int2-g64": QuantSpec(2, 64),
}
EVERYTHING = [*WEIGHTS, "attention"]
ISSUED_PER_S = 132 * 128 * 1.755e9  # instructions a thread: multiprocessors of an H100 or H200, lanes, clock under load
SPILLED_BYTES = 64  # more than these to a thread cost time


class NoDevice:
    """What Triton's launcher asks a driver for, of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: int) -> list[Any]:
    """From now on launches compile only; returns the list that compiled kernels are added to."""
    pretended: Any = NoDevice(capability)
    driver.set_active(pretended)
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = record
    return compiled


def operand(kind: QuantSpec | torch.dtype, ragged: bool = False) -> Operand:
    """A weight of the right form; its numbers do not matter."""
    if isinstance(kind, torch.dtype):
        return dense_operand(torch.empty(ROWS, COLUMNS, dtype=kind))
    groups = COLUMNS // kind.columns_per_group(COLUMNS)
    packed = torch.zeros(ROWS, COLUMNS * kind.bits // 32, dtype=torch.int32)
    zero = None if kind.symmetric else torch.zeros(ROWS, groups, dtype=torch.int8)
    weight = QuantizedWeight(packed, torch.ones(ROWS, groups, dtype=torch.bfloat16), zero, kind, COLUMNS)
    return packed_operand(weight.columns(torch.arange(0, COLUMNS, 3)) if ragged else weight)


def launch_products(wanted: list[str]) -> list[tuple[str, int | None]]:
    """Every product of a step once, of the weights that are `wanted`; returns their names, in order, and how many weights a
    thread takes at a time."""
    scratch, names = Scratch(torch.device("cpu")), []
    vector, squares = torch.empty(1, ROWS, dtype=torch.bfloat16), torch.empty(1, 48)
    places, gain = torch.zeros(1, ROWS, dtype=torch.int32), torch.empty(COLUMNS, dtype=torch.bfloat16)
    norm = NormedInput(vector, None, gain, squares, 1e-5)
    best, best_row = torch.empty(1, ROWS), torch.empty(1, ROWS, dtype=torch.int32)
    fusions = {
        "norm": Fusion(norm=norm),
        "residual + feed": Fusion(epilogue=1, next_input=norm),
        "residual + feed of kept inputs": Fusion(epilogue=1, next_input=replace(norm, place=places)),
        "norm, gate/up": Fusion(norm=norm, epilogue=2),
        "norm, best": Fusion(norm=norm, best=best, best_row=best_row),
    }
    for weight, kind in WEIGHTS.items():
        if weight not in wanted:
            continue
        held = operand(kind, ragged=weight == "int4-g128-ragged")
        x, out = (torch.empty(1, width, dtype=torch.bfloat16) for width in (held.stored_columns, ROWS))
        whole = replace(backend.tiling(held), parts=1)
        weights = held.per * held.elements * whole.rows // (32 * whole.warps)
        for fused, fusion in fusions.items():
            backend.multiply(held, x, out, fusion, scratch, whole)
            names.append((f"{weight} {fused}", weights))
        backend.multiply(held, x, out, Fusion(), scratch, replace(whole, parts=3))
        names.append((f"{weight} in 3 parts", weights))
        if not isinstance(kind, torch.dtype):
            backend.expand_rows(held, 0, torch.empty(ROWS, held.stored_columns, dtype=torch.bfloat16))
            names.append((f"{weight} expand", None))
    return names


def launch_attention() -> list[tuple[str, int | None]]:
    """Attention (3 query heads to a key head, size 128) and the choice of the token."""
    kernels = backend.load_kernels("triton_attention")
    bf16 = torch.empty(1 << 16, dtype=torch.bfloat16)
    numbers, counts = torch.empty(1 << 16), torch.zeros(1 << 10, dtype=torch.int32)
    for qk_norm in (False, True):
        kernels.attend[(8, 16)](
            bf16, bf16, bf16, bf16, bf16, bf16, bf16, counts, bf16, counts, numbers, numbers, counts, 24, 8, 128, 4096, 0,
            ROWS, COLUMNS, 1e-6, 0.09, QK_NORM=qk_norm, PLACED=False, HEADS_A_GROUP=3, R=16, D=128, S=64, SPLITS=16,
            SHORTEST=64, PLAIN=False, **backend.launch_options(4),
        )  # fmt: skip
    tokens = torch.zeros(1 << 10, dtype=torch.int64)
    kernels.choose[(1,)](
        numbers, counts, tokens, tokens, counts, counts, 1002, 1024, 1023, 128255, BLOCK=2048, **backend.launch_options(8)
    )  # fmt: skip
    return [("attention", None), ("attention with q/k norm", None), ("choose", None)]


def loops(code: str) -> list[list[str]]:
    """The innermost loops of disassembled code, each as its instructions."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            instructions.append(instruction[1])
            jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                found.append(instructions[labels[jump[1]] :])
    return found


def inspect(name: str, weights: int | None, kernel: Any, folder: Path) -> dict[str, Any]:
    """What the machine code says; `weights`: how many a thread takes in one turn of the loop."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    row = {
        "kernel": name,
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]) + int(found[3]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
    products = [loop for loop in loops(code) if any(each.startswith("HMMA") for each in loop)]
    if weights is not None and products:
        (loop,) = products
        row |= {
            "copy_bits": max(int(bits) for bits in re.findall(r"LDGSTS[\w.]*\.(32|64|128) ", "\n".join(loop) + " ")),
            "instructions_a_weight": round(len(loop) / weights, 3),
            "barriers_a_turn": sum(each.startswith("BAR") for each in loop),
        }
    return row


def in_short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each weight the worst of its products, and the weight bytes a second that there is time to issue them for."""
    products = []
    for weight, kind in WEIGHTS.items():
        worst = [row for row in rows if row["kernel"].split()[0] == weight and "copy_bits" in row]
        if worst:
            bits = 16 if isinstance(kind, torch.dtype) else kind.bits
            most = max(row["instructions_a_weight"] for row in worst)
            products.append({
                "weight": weight,
                "registers": max(row["registers"] for row in worst),
                "spilled_bytes": max(row["spilled_bytes"] for row in worst),
                "copy_bits": min(row["copy_bits"] for row in worst),
                "instructions_a_weight": most,
                "issue_tb_per_s": round(ISSUED_PER_S / most * bits / 8 / 1e12, 1),
            })  # fmt: skip
    return products


def main() -> int:
    """The program; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90: Hopper")
    parser.add_argument("--only", default=",".join(EVERYTHING), help="comma-separated: " + ", ".join(EVERYTHING))
    parser.add_argument("--out", help="write a record here")
    arguments = parser.parse_args()
    compiled = compile_launches(arguments.capability)
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(EVERYTHING):
        parser.error(f"--only {min(unknown)} is unknown: use some of {', '.join(EVERYTHING)}")
    names = launch_products(wanted) + (launch_attention() if "attention" in wanted else [])
    with tempfile.TemporaryDirectory() as folder:
        rows = [inspect(*name, kernel, Path(folder)) for name, kernel in zip(names, compiled, strict=True)]
    for row in rows:
        line = f"{row['kernel']:45} {row['registers']:4} registers  {row['spilled_bytes']:4} B spilled"
        if "copy_bits" in row:
            line += f"  {row['copy_bits']:3} bit copies  {row['instructions_a_weight']:5.2f} instructions a weight"
        print(line)
    body = {"capability": arguments.capability, "products": in_short(rows), "kernels": rows}
    if arguments.out:
        write_record(arguments.out, new_record("gpu-compile", "Triton kernels", recipe=[], **body))
    print(json.dumps(body))
    return int(any(row["spilled_bytes"] > SPILLED_BYTES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
