"""The C library under AddressSanitizer and UndefinedBehaviorSanitizer: its own tests, with every access checked.

    python -m tools.sanitize [pytest arguments]

Builds the sources with the sanitizers and runs the tests of products and decode steps (or those named) against that build, for
every instruction set of this processor. Says so and ends well where there is no compiler with sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from halve.kernels import cpu
from halve.quantization import QuantSpec, quantize

SOURCES = sorted(Path(cpu.__file__).with_name("csrc").glob("*.c"))
# checks by calls, not written out around every access: half the time to compile
FLAGS = "-std=gnu11 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -shared -fPIC -w".split()
FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
TESTS = ["tests/kernels/test_cpu.py", "tests/decode/test_cpu_step.py"]
_LIBRARY = "HALVE_SANITIZED"


def main(arguments: list[str]) -> int:
    """0 when all tests pass, and a read behind the end of x is found."""
    if library := os.environ.get(_LIBRARY):
        cpu.PATH = Path(library)
        return (
            _read_too_far() if arguments == ["too-far"] else pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
        )
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/_cpu.so"
        if (reason := _build(library)) is not None:
            print(f"the C library is not run under sanitizers: {reason}")
            return 0
        runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        # torch and Python keep memory to the end
        environment = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", _LIBRARY: library}
        command, environment = [sys.executable, "-m", "tools.sanitize"], os.environ | environment
        done = subprocess.run([*command, "too-far"], env=environment, capture_output=True, text=True)
        if "heap-buffer-overflow" not in done.stderr:
            print(f"reading behind the end of x was not found: {done.stderr[-2000:]}")
            return 1
        return subprocess.run([*command, *(arguments or TESTS)], env=environment).returncode


def _build(library: str) -> str | None:
    """In one line why there is no library with sanitizers, None when it is built."""
    try:
        one = subprocess.run(
            ["gcc", *FLAGS, "-x", "c", "-", "-o", library], input="int one;", capture_output=True, text=True
        )
    except FileNotFoundError:
        return "there is no gcc"
    if one.returncode:
        return f"gcc has no sanitizers here ({one.stderr.strip()})"
    subprocess.run(["gcc", *FLAGS, *map(str, SOURCES), "-lm", "-o", library], check=True)
    return None


def _read_too_far() -> int:
    """What must be found: two rows of an x that has one."""
    product = cpu.CpuMatmul(quantize(torch.randn(16, 64), QuantSpec(8, -1)), torch.float32)
    x, y = torch.randn(1, 64), torch.empty(2, 16)
    return product.library.multiply(product.address, x.data_ptr(), y.data_ptr(), 2, cpu.KINDS[x.dtype])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
