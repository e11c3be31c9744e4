"""Speed and memory of models at batch 1: prefill and decode apart, against the bandwidth of the machine.

At batch 1 a decode step has to read every weight once, so bytes / bandwidth is the least time it can take; the share
of that floor a run reaches says how much is left to win on this machine. The protocol is in docs/benchmark.md.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from halve.checkpoint.identity import model_sha256
from halve.checkpoint.reader import DTYPES, check_device
from halve.errors import HalveError
from halve.kernels.cpu import load_library
from halve.measure.kinds import BenchmarkRecord
from halve.measure.machine import bandwidth_gb_per_s, describe_device, dtype_name, last_level_cache_bytes
from halve.measure.pictures import check_picture_path
from halve.measure.records import new_record
from halve.measure.speed.profiling import profile_run
from halve.measure.speed.timed_model import BenchmarkOptions, ExtraTiming, Placement, TimedModel
from halve.measure.speed.timing import spread, step_floor_ms
from halve.progress import progress

_BUSY = 0.8  # a bandwidth below this share of the best: another program was at the memory bus


def benchmark(
    model: str | os.PathLike[str],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    runs: int = 5,
    long_prompt_tokens: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
    profile_plot: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> BenchmarkRecord:
    """Measure one model, loaded from `model` (a folder or hub id; with `random_weights` a config is enough).

    Returns a record; docs/benchmark.md explains its keys. `dtype` None is the checkpoint's own; `long_prompt_tokens`
    None is 2,048 unless that would take over five minutes, 0 leaves the long prompt out. `profile_plot` names a PNG for
    the memory timeline and adds time and memory by operation to the record. Raises HalveError when the tokens do not
    fit the context, the device is not there, or the backend cannot run a layer.
    """
    options = BenchmarkOptions(prompt_tokens, new_tokens, runs, long_prompt_tokens, seed)
    placement = Placement(device, dtype, backend, random_weights)
    plot = None if profile_plot is None else check_picture_path(profile_plot)
    (record,) = benchmark_side_by_side([model], options, placement, command=command, profile_plot=plot)
    return record


def benchmark_side_by_side(
    models: Sequence[str | os.PathLike[str]],
    options: BenchmarkOptions | None = None,
    placement: Placement | None = None,
    *,
    extra: ExtraTiming | None = None,
    command: str | None = None,
    profile_plot: Path | None = None,
) -> list[BenchmarkRecord]:
    """Measure several models with all of them in memory and their runs taking turns, so that ratios between them hold.

    Returns one record per model; with several, each has its decode speed relative to the first. `extra`: what a study
    times in the same rounds. `profile_plot` needs a single model. Raises HalveError as `benchmark` does.
    """
    options = options or BenchmarkOptions()
    placement = placement or Placement()
    if profile_plot is not None and len(models) != 1:
        raise HalveError(f"profiling takes a single model, {len(models)} were given: profile them one by one")
    placement = replace(placement, device=check_device(placement.device))
    timed_models = [TimedModel.open(model, options, placement, extra) for model in models]
    command = command or _command([timed.name for timed in timed_models], options, placement)
    return measure_in_turns(timed_models, options, placement, command, profile_plot)


def measure_in_turns(
    models: Sequence[TimedModel],
    options: BenchmarkOptions,
    placement: Placement,
    command: str,
    profile_plot: Path | None = None,
) -> list[BenchmarkRecord]:
    """Load, warm up and time models in turn; one record each. For `benchmark_side_by_side`, and scripts that make models."""
    with progress("benchmark", len(models) * (2 + options.runs)) as advance:
        for timed in models:
            timed.load(options, placement)
            advance(1)
        for timed in models:
            timed.warm_up(options)
            advance(1)
        # between all runs, and the best one counts: another program may be at the memory bus for some of them
        bandwidths = [bandwidth_gb_per_s(placement.device)]
        for _ in range(options.runs):
            for timed in models:
                timed.measure(options)
                bandwidths.append(bandwidth_gb_per_s(placement.device))
                timed.bandwidths.append(max(bandwidths[-2:]))
                advance(1)
    records = [make_record(timed, options, placement, max(bandwidths), command) for timed in models]
    if profile_plot is not None:
        records[0]["profile"] = profile_run(
            models[0].model, options.prompt_tokens, options.new_tokens, options.seed, profile_plot
        )
    if len(records) > 1:
        _add_ratios(records)
    return records


def make_record(
    timed: TimedModel, options: BenchmarkOptions, placement: Placement, bandwidth: float, command: str
) -> BenchmarkRecord:
    """The record of a measured model; `bandwidth` in GB/s, the best seen in the same run."""
    model, checkpoint = timed.model, timed.checkpoint
    figures = {
        prompt_tokens: _speed(timed, prompt_tokens, options.new_tokens, bandwidth) for prompt_tokens in timed.passes
    }
    if "peak_long" in timed.memory and options.long in figures:
        figures[options.long]["peak_memory_bytes"] = timed.memory["peak_long"]
    record = new_record(
        "benchmark",
        timed.name,
        command=command,
        recipe=[] if placement.random_weights else checkpoint.manifest.get("recipe", []),
        **({} if placement.random_weights else {"model_sha256": model_sha256(checkpoint.folder)}),
        device=placement.device,
        device_name=describe_device(placement.device),
        dtype=dtype_name(model.dtype),
        backend=placement.backend,
        kernels=dict(Counter(str(linear.kernel) for _, linear in model.linears())),
        decode_kernel=timed.passes[options.prompt_tokens][-1].decode_kernel,
        random_weights=placement.random_weights,
        batch=1,
        **(asdict(options) | {"long_prompt_tokens": options.long} | figures[options.prompt_tokens]),
        long_prompt=None if options.long == options.prompt_tokens else figures.get(options.long),
        **_extra_figures(timed),
        weight_bytes=model.weight_bytes(),
        step_weight_bytes=model.step_bytes(),
        **_memory_figures(timed),
        peak_memory_prompt_tokens=options.prompt_tokens,
        bandwidth_gb_per_s=bandwidth,
        bandwidths_beside_gb_per_s=timed.bandwidths,
        bandwidth_kind="copy, reads and writes counted" if placement.device.startswith("cuda") else "read",
        notes=_notes(timed, placement),
        not_measured=timed.not_measured,
    )
    return cast(BenchmarkRecord, record)


def _speed(timed: TimedModel, prompt_tokens: int, new_tokens: int, bandwidth: float) -> dict[str, Any]:
    """Figures of one prompt length: medians over the runs, decode percentiles over the steps of all runs."""
    times = timed.passes[prompt_tokens]
    ttft_p10, ttft, ttft_p90 = spread([t.ttft_ms for t in times])
    step_p10, step, step_p90 = spread([ms for t in times for ms in t.steps_ms])
    _, decode_rate, _ = spread([1e3 * len(t.steps_ms) / sum(t.steps_ms) for t in times])
    floor = step_floor_ms(timed.model, prompt_tokens, new_tokens, bandwidth)
    figures = {
        "prompt_tokens": prompt_tokens,
        "ttft_ms": ttft,
        "ttft_ms_p10": ttft_p10,
        "ttft_ms_p90": ttft_p90,
        "prefill_tokens_per_s": 1e3 * prompt_tokens / ttft,
        "decode_ms_median": step,
        "decode_ms_p10": step_p10,
        "decode_ms_p90": step_p90,
        "decode_tokens_per_s": decode_rate,
        "floor_ms": floor,
        "floor_share": floor / step,
    }
    if timed.bandwidths:
        # each run against the bandwidth beside it: how far a busy machine moves the share
        beside = zip(timed.bandwidths, times, strict=True)
        shares = [floor * bandwidth / near / spread(one.steps_ms)[1] for near, one in beside]
        names = ("floor_beside_share_p10", "floor_beside_share", "floor_beside_share_p90")
        figures |= dict(zip(names, spread(shares), strict=True))
    return figures


def _extra_figures(timed: TimedModel) -> dict[str, dict[str, float] | None]:
    """The figures of what a study had timed in the same rounds."""
    if timed.extra is None:
        return {}
    return {timed.extra.name: timed.extra.figures(timed.extra_rounds) if timed.extra_rounds else None}


def _memory_figures(timed: TimedModel) -> dict[str, int | None]:
    names = {
        "peak_memory_bytes": "peak",
        "peak_memory_loading_bytes": "peak_loading",
        "peak_memory_running_bytes": "peak_running",
        "peak_memory_reserved_bytes": "peak_reserved",
        "loaded_memory_bytes": "loaded",
        "baseline_memory_bytes": "baseline",
    }
    memory = timed.memory
    figures = {key: memory.get(name) for key, name in names.items() if name in memory or name == "peak"}
    if "peak" in memory and "baseline" in memory:
        figures["peak_memory_above_baseline_bytes"] = memory["peak"] - memory["baseline"]
    return figures


def _notes(timed: TimedModel, placement: Placement) -> list[str]:
    """What a reader of the figures has to know."""
    model = timed.model
    notes = ["decode percentiles are over the steps of all runs, prefill percentiles over the runs"]
    if placement.random_weights and timed.checkpoint.raw.get("quantization_config"):
        notes.append("random weights are dense: the config's quantization is not applied")
    if placement.device.startswith("cuda"):
        notes.append("peak memory is the allocator's; it includes loading")
        return notes
    if "peak" in timed.memory:
        notes.append("peak memory is the resident memory of a separate process, Python and PyTorch included")
    if timed.bandwidths and min(timed.bandwidths) < _BUSY * max(timed.bandwidths):
        low, high = min(timed.bandwidths), max(timed.bandwidths)
        notes.append(f"the machine was busy: the bandwidth beside the runs was {low:.1f} to {high:.1f} GB/s")
    if isinstance(reason := load_library(), str):
        notes.append(f"PyTorch's own operations ran: {reason}")
    cache = last_level_cache_bytes()
    if model.step_bytes() < cache:
        notes.append(
            f"a step reads {model.step_bytes()} bytes, which fit in the last-level cache ({cache} bytes): "
            f"the floor from memory bandwidth does not bind this model"
        )
    return notes


def _command(names: list[str], options: BenchmarkOptions, placement: Placement) -> str:
    """The command line that measures the same again."""
    words = ["halve", "benchmark", *names]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    words += [] if options.runs == BenchmarkOptions().runs else ["--runs", str(options.runs)]
    words += [] if options.long_prompt_tokens is None else ["--long-prompt-tokens", str(options.long)]
    words += ["--device", placement.device]
    names_of_dtypes = {dtype: name for name, dtype in DTYPES.items()}
    words += ["--dtype", names_of_dtypes[placement.dtype]] if placement.dtype in names_of_dtypes else []
    words += [] if placement.backend == "auto" else ["--backend", placement.backend]
    words += ["--random-weights"] if placement.random_weights else []
    return shlex.join(words)


def _add_ratios(records: list[BenchmarkRecord]) -> None:
    first = records[0]["decode_ms_median"]
    for record in records:
        record["side_by_side"] = {
            "models": [r["model"] for r in records],
            "decode_speed_to_first": first / record["decode_ms_median"],
        }
