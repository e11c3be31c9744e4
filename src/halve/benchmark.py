"""Speed and memory of a model at batch 1: prefill and decode apart, against the bandwidth of the machine.

At batch 1 a decode step has to read every weight once, so bytes / bandwidth is the least time it can take; the share
of that floor a run reaches says how much is left to win on this machine. The protocol is in docs/benchmark.md.
"""

from __future__ import annotations

import gc
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halve.errors import HalveError
from halve.generate import Decoder, Sampling, generate
from halve.machine import MIB, bandwidth_gb_per_s, describe_device, last_level_cache_bytes
from halve.model import KVCache, Model
from halve.peak_memory import peak_memory
from halve.progress import progress
from halve.records import Record, new_record

SYSTEM1_TOKENS = 101  # system 1 timed t(1 token) and t(101 tokens)


@dataclass(frozen=True)
class Settings:
    """What is measured and how; recorded as it is."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    runs: int = 5
    long_prompt_tokens: int = 2048  # 0: not measured
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = {"prompt_tokens": 1, "new_tokens": 2, "runs": 1, "long_prompt_tokens": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise HalveError(f"{name}={getattr(self, name)} is too small: use at least {least}")

    def check_context(self, context: int) -> None:
        """Raise HalveError unless prompt and new tokens fit the model's context."""
        if self.prompt_tokens + self.new_tokens > context:
            raise HalveError(
                f"{self.prompt_tokens} prompt tokens + {self.new_tokens} new tokens exceed the model's context of "
                f"{context}: lower --prompt-tokens or --new-tokens"
            )


def benchmark(
    model: str | os.PathLike[str],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    runs: int = 5,
    long_prompt_tokens: int = 2048,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
    profile_plot: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> Record:
    """Measure one model, reloaded from `model` (a folder or hub id; with `random_weights` a config is enough).

    Returns a record (see docs/benchmark.md for every key). `dtype` None is the checkpoint's own. `profile_plot` names a
    PNG for the memory timeline and adds time and memory by operation to the record. Raises HalveError when the
    tokens do not fit the context, `device` is not there, or `backend` cannot run a layer.
    """
    return benchmark_all(
        [model],
        settings=Settings(prompt_tokens, new_tokens, runs, long_prompt_tokens, seed),
        device=device,
        dtype=dtype,
        backend=backend,
        random_weights=random_weights,
        profile_plot=profile_plot,
        command=command,
    )[0]


def benchmark_all(
    models: Sequence[str | os.PathLike[str]],
    *,
    settings: Settings | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    random_weights: bool = False,
    profile_plot: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> list[Record]:
    """Measure several models side by side: all are in memory, and their runs take turns, so ratios between them hold.

    One record per model; each names the others under "side_by_side" with its decode speed relative to the first.
    """
    settings, chosen = settings or Settings(), check_device(device)
    options = {"dtype": dtype, "backend": backend, "random_weights": random_weights}
    subjects = []
    with progress("benchmark", len(models) * (3 + 3 * settings.runs)) as advance:
        for model in models:
            subjects.append(_prepare(model, settings, chosen, options))
            advance(2)
        bandwidth = bandwidth_gb_per_s(chosen)
        for subject in subjects:
            _warm_up(subject, settings)
            advance(1)
        for _ in range(settings.runs):
            for subject in subjects:
                _measure_once(subject, settings)
                advance(3)
        bandwidth = max(bandwidth, bandwidth_gb_per_s(chosen))
    records = [_record(s, settings, bandwidth, options, command) for s in subjects]
    if profile_plot is not None:
        _profile(subjects[0], records[0], settings, Path(profile_plot))
    for record in records if len(records) > 1 else []:
        ratio = records[0]["decode_ms_median"] / record["decode_ms_median"]
        record["side_by_side"] = {"models": [r["model"] for r in records], "decode_speed_ratio_to_first": ratio}
    return records
