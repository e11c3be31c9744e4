"""A model in the form that other programs run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from halve.checkpoint.gguf_export import Exported, export_gguf
from halve.errors import HalveError

TARGETS: dict[str, Callable[..., Exported]] = {"gguf": export_gguf}


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    requantize: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model folder or hub id as `out`, in the form `to` ("gguf").

    Dense weights in `dtype`, default as stored. Codes are written as they are; those that the form has no place for are
    refused, or rounded again to the type `requantize`. Raises HalveError.
    """
    if to not in TARGETS:
        raise HalveError(f"--to {to!r} is not known: use {' or '.join(TARGETS)}")
    return TARGETS[to](model, out, requantize=requantize, dtype=dtype, overwrite=overwrite)
