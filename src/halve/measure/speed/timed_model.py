"""One model under measurement: loaded, warmed up and timed round by round, its peak memory noted.

`benchmark` drives one or several of them and turns what they saw into records.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from halve.checkpoint.reader import Checkpoint, load_model, open_checkpoint
from halve.decode.sampling import check_seed
from halve.errors import HalveError
from halve.measure.machine import dtype_name, resident_bytes
from halve.measure.speed.peak_memory import peak_memory
from halve.measure.speed.timing import PassTimes, random_prompt, time_pass
from halve.model.decoder import Model
from halve.ranks.collective import ALONE, Ranks

LONG_PROMPT_TOKENS = 2048
LONG_PROMPT_BUDGET_S = 300  # left out by default where it would take longer: a large model on a small CPU takes hours


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured and how; recorded as it is."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    runs: int = 5
    long_prompt_tokens: int | None = None  # 0: not measured; None: 2,048 unless that takes too long
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
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
    ranks: Ranks = ALONE


class ExtraTiming(ABC):
    """What a study has timed in every round besides the passes of a benchmark; `name` is its key in the record.

    Left out, with the reason, where `new_tokens` after the prompt do not fit the context.
    """

    name: str
    new_tokens: int

    @abstractmethod
    def time(self, model: Model, prompt: list[int]) -> tuple[float, ...]:
        """The times of one round in milliseconds."""

    @abstractmethod
    def figures(self, rounds: Sequence[tuple[float, ...]]) -> dict[str, float]:
        """What the record holds of the times of all rounds."""


@dataclass
class TimedModel:
    """One model under measurement and what was seen of it so far."""

    name: str
    checkpoint: Checkpoint
    not_measured: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    passes: dict[int, list[PassTimes]] = field(default_factory=dict)  # by prompt length
    extra: ExtraTiming | None = None
    extra_rounds: list[tuple[float, ...]] = field(default_factory=list)  # the times of `extra`, by round
    bandwidths: list[float] = field(default_factory=list)  # GB/s of the machine beside every round
    _model: Model | None = None
    _cuda_bytes: int = 0  # what the allocator holds for this model

    @classmethod
    def open(
        cls,
        name: str | os.PathLike[str],
        options: BenchmarkOptions,
        placement: Placement,
        extra: ExtraTiming | None = None,
    ) -> TimedModel:
        """Check everything that can be wrong with the request, before weights are read; raises HalveError."""
        checkpoint = open_checkpoint(os.fspath(name), placement.random_weights, placement.dtype)
        context, new = checkpoint.config.max_positions, options.new_tokens
        if options.prompt_tokens + new > context:
            raise HalveError(
                f"{options.prompt_tokens} prompt tokens + {new} new tokens exceed the context of {name}, {context}: "
                f"lower --prompt-tokens or --new-tokens"
            )
        timed = cls(os.fspath(name), checkpoint, passes={options.prompt_tokens: []}, extra=extra)
        beyond = f"new tokens exceed the model's context of {context}"
        if options.long == 0:
            timed.not_measured["long_prompt"] = "not asked for"
        elif options.long + new > context:
            timed.not_measured["long_prompt"] = f"{options.long} prompt tokens + {new} {beyond}"
        else:
            timed.passes.setdefault(options.long, [])
        if extra is not None and options.prompt_tokens + extra.new_tokens > context:
            timed.not_measured[extra.name] = f"{options.prompt_tokens} prompt tokens + {extra.new_tokens} {beyond}"
        reason = "the weights are random" if placement.random_weights else "a benchmark measures speed and memory only"
        timed.not_measured |= {"accuracy": reason, "perplexity": reason}
        return timed

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def load(self, options: BenchmarkOptions, placement: Placement) -> None:
        """Load the model; on the CPU a process of its own does it first, for the peak memory, and is gone by then."""
        if torch.device(placement.device).type == "cuda":
            self._load_on_cuda(placement)
            return
        if placement.ranks.size > 1:  # no process of its own could be one of the ranks
            self.memory = {"baseline": resident_bytes()["now"]} if resident_bytes() else {}
            self._load(placement)
            return
        try:
            self.memory = peak_memory(
                self.name,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                long_prompt_tokens=options.long if len(self.passes) > 1 else 0,
                long_budget_s=LONG_PROMPT_BUDGET_S if options.long_prompt_tokens is None else None,
                dtype=None if placement.dtype is None else dtype_name(placement.dtype),
                backend=placement.backend,
                random_weights=placement.random_weights,
                threads=torch.get_num_threads(),
            )
        except HalveError as error:
            self.not_measured["peak_memory_bytes"] = str(error)
        self._load(placement)

    def _load(self, placement: Placement) -> None:
        self._model = load_model(
            self.name,
            dtype=placement.dtype,
            device=placement.device,
            backend=placement.backend,
            random_weights=placement.random_weights,
            ranks=placement.ranks,
        )

    def _load_on_cuda(self, placement: Placement) -> None:
        """Load, and note the allocator's peak above what other models hold already."""
        device = torch.device(placement.device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._load(placement)
        self._cuda_bytes = torch.cuda.memory_allocated(device) - before
        self.memory = {
            "loaded": self._cuda_bytes,
            "peak_loading": torch.cuda.max_memory_allocated(device) - before,
        }

    def measure(self, options: BenchmarkOptions) -> None:
        """One round: every prompt length timed once, and what a study times besides."""
        for prompt_tokens, times in self.passes.items():
            prompt = random_prompt(self.model, prompt_tokens, options.seed)
            times.append(time_pass(self.model, prompt, options.new_tokens))
        if self.extra is not None and self.extra.name not in self.not_measured:
            prompt = random_prompt(self.model, options.prompt_tokens, options.seed)
            self.extra_rounds.append(self.extra.time(self.model, prompt))

    def warm_up(self, options: BenchmarkOptions) -> None:
        """A round whose times are thrown away; on CUDA its first pass gives the peak memory."""
        prompt = random_prompt(self.model, options.prompt_tokens, options.seed)
        on_cuda = self.model.device.type == "cuda"
        if on_cuda:
            self._watch_cuda_memory(prompt, options)
        else:
            time_pass(self.model, prompt, 2)
        if options.long_prompt_tokens is None and options.long in self.passes:
            self._leave_out_a_slow_prompt(prompt, options)
        if on_cuda and len(self.passes) > 1:
            long = self._cuda_peak(random_prompt(self.model, options.long, options.seed), options)
            self.memory["peak_long"] = max(long, self.memory["peak_loading"])
        self.measure(options)
        if self.model.ranks.size > 1 and not on_cuda and "peak" in resident_bytes():
            self.memory["peak"] = resident_bytes()["peak"]  # before anything else is measured in this process
        for times in (*self.passes.values(), self.extra_rounds):
            times.clear()

    def _leave_out_a_slow_prompt(self, prompt: list[int], options: BenchmarkOptions) -> None:
        ttft_ms = time_pass(self.model, prompt, 2).ttft_ms  # the pass before took the compiling and first touches
        needed_s = ttft_ms / 1e3 * options.long / options.prompt_tokens * (options.runs + 1)
        needed_s = max(self.model.ranks.gather(needed_s))  # all ranks decide alike
        if needed_s > LONG_PROMPT_BUDGET_S and options.long != options.prompt_tokens:
            del self.passes[options.long]
            self.not_measured["long_prompt"] = (
                f"{options.long} prompt tokens would take about {needed_s / 60:.0f} minutes: "
                f"ask for them with --long-prompt-tokens {options.long}"
            )

    def _watch_cuda_memory(self, prompt: list[int], options: BenchmarkOptions) -> None:
        """Note what the allocator held and reserved during one prompt and its continuation, other models' bytes taken off."""
        torch.cuda.empty_cache()
        running, device = self._cuda_peak(prompt, options), self.model.device
        self.memory |= {
            "peak_running": running,
            "peak": max(running, self.memory["peak_loading"]),
            "peak_reserved": torch.cuda.max_memory_reserved(device) - self._cuda_bytes_of_others(),
        }

    def _cuda_peak(self, prompt: list[int], options: BenchmarkOptions) -> int:
        """The most bytes the allocator held for this model during one prompt and its continuation."""
        others = self._cuda_bytes_of_others()
        torch.cuda.reset_peak_memory_stats(self.model.device)
        time_pass(self.model, prompt, options.new_tokens)
        return torch.cuda.max_memory_allocated(self.model.device) - others

    def _cuda_bytes_of_others(self) -> int:
        return torch.cuda.memory_allocated(self.model.device) - self._cuda_bytes
