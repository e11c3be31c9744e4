"""Speed and memory of a model at batch 1: prefill and decode apart, against the bandwidth of the machine.

At batch 1 a decode step has to read every weight once, so bytes / bandwidth is the least time it can take; the share
of that floor a run reaches says how much is left to win on this machine. The protocol is in docs/benchmark.md.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint import DTYPES, Checkpoint, check_device, compute_dtype, load_model, open_checkpoint
from halve.errors import HalveError
from halve.machine import bandwidth_gb_per_s, describe_device, last_level_cache_bytes
from halve.model import Model
from halve.peak_memory import peak_memory
from halve.profiling import profile_run
from halve.progress import progress
from halve.records import Record, check_output_path, new_record
from halve.timing import PassTimes, generation_ms, random_prompt, spread, step_floor_ms, time_pass

LONG_PROMPT_TOKENS = 2048
LONG_PROMPT_BUDGET_S = 300  # left out by default where it would take longer: a large model on a small CPU takes hours
SYSTEM1_TOKENS = 101  # system 1's protocol: t(1 token), and 100 / (t(101 tokens) - t(1 token))


@dataclass(frozen=True)
class Settings:
    """What is measured and how; recorded as it is."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    runs: int = 5
    long_prompt_tokens: int | None = None  # 0: not measured; None: 2,048 unless that takes too long
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = {"prompt_tokens": 1, "new_tokens": 2, "runs": 1, "long_prompt_tokens": 0}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise HalveError(f"{name}={value} is too small: use at least {least}")

    @property
    def long(self) -> int:
        """Tokens of the long prompt, 0 for none."""
        return LONG_PROMPT_TOKENS if self.long_prompt_tokens is None else self.long_prompt_tokens


@dataclass(frozen=True)
class Placement:
    """Where and how every model of a benchmark is loaded."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    backend: str = "auto"
    random_weights: bool = False


@dataclass
class Subject:
    """One model under measurement and what was seen of it so far."""

    name: str
    checkpoint: Checkpoint
    not_measured: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    passes: dict[int, list[PassTimes]] = field(default_factory=dict)  # by prompt length
    first_token_ms: list[float] = field(default_factory=list)
    many_tokens_ms: list[float] = field(default_factory=list)
    _model: Model | None = None
    _cuda_bytes: int = 0  # what the allocator holds for this model

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def load(self, placement: Placement) -> None:
        self._model = load_model(
            self.name,
            dtype=placement.dtype,
            device=placement.device,
            backend=placement.backend,
            random_weights=placement.random_weights,
        )

    def load_on_cuda(self, placement: Placement) -> None:
        """Load, and note the allocator's peak above what other models hold already."""
        device = torch.device(placement.device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.load(placement)
        self._cuda_bytes = torch.cuda.memory_allocated(device) - before
        self.memory = {
            "loaded": self._cuda_bytes,
            "peak_loading": torch.cuda.max_memory_allocated(device) - before,
        }

    def watch_cuda_memory(self, settings: Settings) -> None:
        """Note the allocator's peak during one prompt and its continuation, other models' bytes taken off."""
        device = self.model.device
        others = torch.cuda.memory_allocated(device) - self._cuda_bytes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        time_pass(self.model, random_prompt(self.model, settings.prompt_tokens, settings.seed), settings.new_tokens)
        running = torch.cuda.max_memory_allocated(device) - others
        self.memory |= {
            "peak_running": running,
            "peak": max(running, self.memory["peak_loading"]),
            "peak_reserved": torch.cuda.max_memory_reserved(device) - others,
        }


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
) -> Record:
    """Measure one model, loaded from `model` (a folder or hub id; with `random_weights` a config is enough).

    Returns a record; docs/benchmark.md explains its keys. `dtype` None is the checkpoint's own; `long_prompt_tokens`
    None is 2,048 unless that would take over five minutes, 0 leaves the long prompt out. `profile_plot` names a PNG for the memory timeline and adds time and memory by operation
    to the record. Raises HalveError when the tokens do not fit the context, the device is not there, or the backend
    cannot run a layer.
    """
    settings = Settings(prompt_tokens, new_tokens, runs, long_prompt_tokens, seed)
    placement = Placement(device, dtype, backend, random_weights)
    plot = None if profile_plot is None else check_output_path(profile_plot)
    (record,) = benchmark_side_by_side([model], settings, placement, command=command, profile_plot=plot)
    return record


def benchmark_side_by_side(
    models: Sequence[str | os.PathLike[str]],
    settings: Settings | None = None,
    placement: Placement | None = None,
    *,
    command: str | None = None,
    profile_plot: Path | None = None,
) -> list[Record]:
    """Measure several models with all of them in memory and their runs taking turns, so that ratios between them hold.

    Returns one record per model; with several, each has its decode speed relative to the first. `profile_plot` needs a
    single model. Raises HalveError as `benchmark` does.
    """
    settings, placement = settings or Settings(), placement or Placement()
    if profile_plot is not None and len(models) != 1:
        raise HalveError(f"profiling takes a single model, {len(models)} were given: profile them one by one")
    check_device(placement.device)
    subjects = [_open(model, settings, placement) for model in models]
    with progress("benchmark", len(subjects) * (2 + settings.runs) + 2) as advance:
        for subject in subjects:
            _load(subject, settings, placement)
            advance(1)
        bandwidth = bandwidth_gb_per_s(placement.device)
        advance(1)
        for subject in subjects:
            _warm_up(subject, settings)
            advance(1)
        for _ in range(settings.runs):
            for subject in subjects:
                _measure_once(subject, settings)
                advance(1)
        # measured before and after, best taken: another program may have been at the memory bus for one of them
        bandwidth = max(bandwidth, bandwidth_gb_per_s(placement.device))
        advance(1)
    records = [_record(subject, settings, placement, bandwidth, command) for subject in subjects]
    if profile_plot is not None:
        records[0]["profile"] = profile_run(
            subjects[0].model, settings.prompt_tokens, settings.new_tokens, settings.seed, profile_plot
        )
    if len(records) > 1:
        _add_ratios(records)
    return records


def _open(model: str | os.PathLike[str], settings: Settings, placement: Placement) -> Subject:
    """Everything that can be wrong with the request is found here, before weights are read."""
    checkpoint = open_checkpoint(os.fspath(model), placement.random_weights, placement.dtype)
    context = checkpoint.config.max_positions
    if settings.prompt_tokens + settings.new_tokens > context:
        raise HalveError(
            f"{settings.prompt_tokens} prompt tokens + {settings.new_tokens} new tokens exceed the context of {model}, "
            f"{context}: lower --prompt-tokens or --new-tokens"
        )
    subject = Subject(os.fspath(model), checkpoint, passes={settings.prompt_tokens: []})
    long = settings.long
    if long == 0:
        subject.not_measured["long_prompt"] = "not asked for"
    elif long + settings.new_tokens > context:
        subject.not_measured["long_prompt"] = (
            f"{long} prompt tokens + {settings.new_tokens} new tokens exceed the model's context of {context}"
        )
    elif long != settings.prompt_tokens:
        subject.passes[long] = []
    if settings.prompt_tokens + SYSTEM1_TOKENS > context:
        asked = f"{settings.prompt_tokens} prompt tokens + {SYSTEM1_TOKENS} new tokens"
        subject.not_measured["system1"] = f"{asked} exceed the model's context of {context}"
    reason = "the weights are random" if placement.random_weights else "a benchmark measures speed and memory only"
    subject.not_measured["accuracy"] = subject.not_measured["perplexity"] = reason
    return subject


def _load(subject: Subject, settings: Settings, placement: Placement) -> None:
    """Load one model; on the CPU its peak memory is measured before, so that two copies are never in memory."""
    if torch.device(placement.device).type == "cuda":
        subject.load_on_cuda(placement)
        return
    try:
        subject.memory = peak_memory(
            subject.name,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            dtype=None if placement.dtype is None else _dtype_name(placement.dtype),
            backend=placement.backend,
            random_weights=placement.random_weights,
            threads=torch.get_num_threads(),
        )
    except HalveError as error:
        subject.not_measured["peak_memory_bytes"] = str(error)
    subject.load(placement)


def _measure_once(subject: Subject, settings: Settings) -> None:
    model = subject.model
    for prompt_tokens, times in subject.passes.items():
        prompt = random_prompt(model, prompt_tokens, settings.seed)
        times.append(time_pass(model, prompt, settings.new_tokens))
    if "system1" not in subject.not_measured:
        prompt = random_prompt(model, settings.prompt_tokens, settings.seed)
        subject.first_token_ms.append(generation_ms(model, prompt, 1))
        subject.many_tokens_ms.append(generation_ms(model, prompt, SYSTEM1_TOKENS))


def _warm_up(subject: Subject, settings: Settings) -> None:
    """One round whose times are thrown away; on CUDA its first pass gives the peak memory."""
    prompt = random_prompt(subject.model, settings.prompt_tokens, settings.seed)
    if subject.model.device.type == "cuda":
        subject.watch_cuda_memory(settings)
    else:
        time_pass(subject.model, prompt, 2)
    if settings.long_prompt_tokens is None and settings.long in subject.passes:
        ttft_ms = time_pass(subject.model, prompt, 2).ttft_ms  # the pass before took the compiling and first touches
        needed_s = ttft_ms / 1e3 * settings.long / settings.prompt_tokens * (settings.runs + 1)
        if needed_s > LONG_PROMPT_BUDGET_S:
            del subject.passes[settings.long]
            subject.not_measured["long_prompt"] = (
                f"{settings.long} prompt tokens would take about {needed_s / 60:.0f} minutes: "
                f"ask for them with --long-prompt-tokens {settings.long}"
            )
    _measure_once(subject, settings)
    for times in (*subject.passes.values(), subject.first_token_ms, subject.many_tokens_ms):
        times.clear()


def _record(
    subject: Subject, settings: Settings, placement: Placement, bandwidth: float, command: str | None
) -> Record:
    model, checkpoint = subject.model, subject.checkpoint
    figures = {
        prompt_tokens: _speed(model, prompt_tokens, settings.new_tokens, times, bandwidth)
        for prompt_tokens, times in subject.passes.items()
    }
    return new_record(
        "benchmark",
        subject.name,
        command=command or _command(subject.name, settings, placement),
        recipe=[] if placement.random_weights else checkpoint.manifest.get("recipe", []),
        device=placement.device,
        device_name=describe_device(placement.device),
        dtype=_dtype_name(compute_dtype(checkpoint, placement.dtype)),
        backend=placement.backend,
        kernels=dict(Counter(str(linear.kernel) for _, linear in model.linears())),
        random_weights=placement.random_weights,
        batch=1,
        **(asdict(settings) | {"long_prompt_tokens": settings.long} | figures[settings.prompt_tokens]),
        long_prompt=None if settings.long == settings.prompt_tokens else figures.get(settings.long),
        system1=_system1(subject),
        weight_bytes=model.weight_bytes(),
        step_weight_bytes=model.step_bytes(),
        **_memory_figures(subject),
        bandwidth_gb_per_s=bandwidth,
        bandwidth_kind="copy, reads and writes counted" if placement.device.startswith("cuda") else "read",
        notes=_notes(subject, placement),
        not_measured=subject.not_measured,
    )


def _speed(
    model: Model, prompt_tokens: int, new_tokens: int, times: list[PassTimes], bandwidth: float
) -> dict[str, Any]:
    """Figures of one prompt length: medians over the runs, decode percentiles over the steps of all runs."""
    ttft_p10, ttft, ttft_p90 = spread([t.ttft_ms for t in times])
    step_p10, step, step_p90 = spread([ms for t in times for ms in t.steps_ms])
    _, decode_rate, _ = spread([1e3 * len(t.steps_ms) / sum(t.steps_ms) for t in times])
    floor = step_floor_ms(model, prompt_tokens, new_tokens, bandwidth)
    return {
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


def _system1(subject: Subject) -> dict[str, float] | None:
    """System 1's two figures: the latency of one token, and tokens/s = 100 / (t(101) - t(1))."""
    if not subject.first_token_ms:
        return None
    low, first, high = spread(subject.first_token_ms)
    rates = [
        1e3 * (SYSTEM1_TOKENS - 1) / (many - one)
        for one, many in zip(subject.first_token_ms, subject.many_tokens_ms, strict=True)
    ]
    return {
        "latency_ms": first,
        "latency_ms_p10": low,
        "latency_ms_p90": high,
        "tokens_per_s": spread(rates)[1],
    }


def _memory_figures(subject: Subject) -> dict[str, int | None]:
    names = {
        "peak_memory_bytes": "peak",
        "peak_memory_loading_bytes": "peak_loading",
        "peak_memory_running_bytes": "peak_running",
        "peak_memory_reserved_bytes": "peak_reserved",
        "loaded_memory_bytes": "loaded",
        "baseline_memory_bytes": "baseline",
    }
    held = subject.memory
    figures = {key: held.get(name) for key, name in names.items() if name in held or name == "peak"}
    if "peak" in held and "baseline" in held:
        figures["peak_memory_above_baseline_bytes"] = held["peak"] - held["baseline"]
    return figures


def _notes(subject: Subject, placement: Placement) -> list[str]:
    """What a reader of the figures has to know."""
    model = subject.model
    notes = ["decode percentiles are over the steps of all runs, prefill percentiles over the runs"]
    if placement.random_weights and subject.checkpoint.raw.get("quantization_config"):
        notes.append("random weights are dense: the config's quantization is not applied")
    if placement.device.startswith("cuda"):
        notes.append("peak memory is the allocator's; it includes loading")
        return notes
    notes.append("peak memory is the resident memory of a separate process, Python and PyTorch included")
    cache = last_level_cache_bytes()
    if model.step_bytes() < cache:
        notes.append(
            f"a step reads {model.step_bytes()} bytes, which fit in the last-level cache ({cache} bytes): "
            f"the floor from memory bandwidth does not bind this model"
        )
    return notes


def _command(name: str, settings: Settings, placement: Placement) -> str:
    """The command line that measures the same again."""
    words = ["halve", "benchmark", name]
    words += ["--prompt-tokens", str(settings.prompt_tokens), "--new-tokens", str(settings.new_tokens)]
    words += [] if settings.long_prompt_tokens is None else ["--long-prompt-tokens", str(settings.long)]
    words += ["--device", placement.device]
    names = {dtype: option for option, dtype in DTYPES.items()}
    words += ["--dtype", names[placement.dtype]] if placement.dtype in names else []
    words += [] if placement.backend == "auto" else ["--backend", placement.backend]
    words += ["--random-weights"] if placement.random_weights else []
    return shlex.join(words)


def _add_ratios(records: list[Record]) -> None:
    first = records[0]["decode_ms_median"]
    for record in records:
        record["side_by_side"] = {
            "models": [r["model"] for r in records],
            "decode_speed_to_first": first / record["decode_ms_median"],
        }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
