"""Lets the Triton backend take tensors on the CPU, where something runs its kernels: Triton's interpreter, or `emulate`."""

from __future__ import annotations

import torch

from halve.kernels import triton_backend


def cpu_too(device: torch.device) -> bool:
    """In the place of `triton_backend.runs_on`."""
    return device.type in ("cuda", "cpu")


def serve_cpu() -> None:
    """From now on, for the whole process."""
    triton_backend.runs_on = cpu_too
