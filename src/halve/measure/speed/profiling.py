"""Where the time and the memory of a pass go: by operation (torch's profiler), and the allocations over time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from halve.decode.generate import Decoder
from halve.decode.sampling import Sampling
from halve.kernels import Matmul
from halve.measure.pictures import COLOURS, new_figure, write_png
from halve.measure.speed.timing import random_prompt
from halve.measure.units import byte_unit
from halve.model.decoder import Model

_OPERATIONS_KEPT = 30
_PROFILED_STEPS = 16  # steps are alike, and a trace grows with every one
_CPU_DEVICE_TYPE, _CUDA_DEVICE_TYPE = 0, 1  # as c10::DeviceType numbers them in a trace


@torch.inference_mode()
def profile_run(model: Model, prompt_tokens: int, new_tokens: int, seed: int, plot: Path) -> dict[str, Any]:
    """Profile a prefill and up to 16 decode steps; writes the memory timeline to `plot` (PNG).

    Returns, for a record: the operations that took the most time of their own (milliseconds, bytes they allocated net
    of what they freed) and the highest allocation above the weights. Raises OutputError when `plot` cannot be written.
    """
    from torch.profiler import ProfilerActivity, profile

    steps = min(new_tokens - 1, _PROFILED_STEPS)
    prompt, on_cuda = random_prompt(model, prompt_tokens, seed), model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    # on a GPU the trace names the kernels themselves, and the fused decode step is what should run
    named = nullcontext() if on_cuda else _named_products(model)
    with named, profile(activities=activities, profile_memory=True) as profiler:
        with record_function("halve.prefill"):
            decoder = Decoder(model, [prompt], prompt_tokens + steps, Sampling())
            tokens = decoder.prefill()
        with record_function("halve.decode"):
            for _ in range(steps):
                tokens = decoder.step(tokens)
        if on_cuda:
            torch.cuda.synchronize(model.device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    timeline, phases = memory_timeline(events, on_cuda), _phases(events)
    _plot(timeline, phases, plot)
    return {
        "prompt_tokens": prompt_tokens,
        "decode_steps": steps,
        "phase_ms": {name: duration for name, (_, duration) in phases.items()},
        "operations": _operations(profiler, on_cuda),
        "peak_above_weights_bytes": max((allocated for _, allocated in timeline), default=0),
        "memory_timeline": plot.name,
    }


@contextmanager
def _named_products(model: Model) -> Iterator[None]:
    """Give every linear's product the name of its kernel, since the profiler sees torch's own operations only."""
    linears = [linear for _, linear in model.linears()]
    kernels = [linear._matmul for linear in linears]

    def named(matmul: Matmul) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with record_function(f"linear ({matmul.kernel})"):
                return matmul(x)

        return run

    for linear, matmul in zip(linears, kernels, strict=True):
        if matmul is not None:
            linear._matmul = named(matmul)  # type: ignore[assignment]
    try:
        yield
    finally:
        for linear, matmul in zip(linears, kernels, strict=True):
            linear._matmul = matmul


def _operations(profiler: torch.profiler.profile, on_cuda: bool) -> list[dict[str, Any]]:
    rows = []
    for event in profiler.key_averages():
        if event.key.startswith("halve."):
            continue
        row = {
            "operation": event.key,
            "calls": event.count,
            "cpu_ms": event.self_cpu_time_total / 1e3,
            "cpu_allocated_bytes": event.self_cpu_memory_usage,
        }
        if on_cuda:
            row["cuda_ms"] = event.self_device_time_total / 1e3
            row["cuda_allocated_bytes"] = event.self_device_memory_usage
        rows.append(row)
    rows.sort(key=lambda row: row["cuda_ms" if on_cuda else "cpu_ms"], reverse=True)
    return rows[:_OPERATIONS_KEPT]


def memory_timeline(events: list[dict[str, Any]], on_cuda: bool) -> list[tuple[float, int]]:
    """(milliseconds since the first event, bytes allocated above those at the start) after every allocation and release.

    `events` are the traceEvents of a Chrome trace that was recorded with memory.
    """
    device_type = _CUDA_DEVICE_TYPE if on_cuda else _CPU_DEVICE_TYPE
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device_type
    )
    start = min((event["ts"] for event in events if event.get("ph") == "X"), default=0.0)
    timeline: list[tuple[float, int]] = []
    allocated = 0
    for at_us, change in changes:
        allocated += change
        timeline.append(((at_us - start) / 1e3, allocated))
    return timeline


def _phases(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Start (milliseconds since the first event) and duration of prefill and decode, as the CPU saw them."""
    spans = [event for event in events if event.get("ph") == "X"]
    start = min((event["ts"] for event in spans), default=0.0)
    return {
        event["name"].removeprefix("halve."): ((event["ts"] - start) / 1e3, event["dur"] / 1e3)
        for event in spans
        if event.get("cat") == "user_annotation" and event["name"].startswith("halve.")
    }


def _plot(timeline: list[tuple[float, int]], phases: dict[str, tuple[float, float]], path: Path) -> None:
    scale, unit = byte_unit(max((allocated for _, allocated in timeline), default=0))
    with new_figure((9, 4)) as figure:
        axes = figure.subplots()
        axes.step(
            [at for at, _ in timeline], [allocated / scale for _, allocated in timeline], where="post", linewidth=0.8
        )
        for number, (name, (start, duration)) in enumerate(phases.items(), 1):
            axes.axvspan(start, start + duration, alpha=0.12, color=COLOURS[number], label=name)
        axes.set(xlabel="time (ms)", ylabel=f"allocated above the weights ({unit})")
        axes.set_title("Memory during one prompt and its continuation")
        axes.legend(loc="upper right")
        write_png(figure, path)
