"""The kernels as Triton compiles them for Hopper, run on the CPU in a process whose Triton does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA GPUs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the compiled kernels in the other tests")
def test_compiled_kernels() -> None:
    file = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
