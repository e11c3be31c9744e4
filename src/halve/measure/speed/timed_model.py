"""One model under measurement: loaded, warmed up and timed round by round, its peak memory noted.

`benchmarking` drives one or several of them and turns what they saw into records.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from halve.checkpoint.reader import Checkpoint, load_model, open_checkpoint
from halve.errors import HalveError
from halve.measure.speed.peak_memory import peak_memory
from halve.measure.speed.timing import PassTimes, generation_ms, random_prompt, time_pass
from halve.model.decoder import Model

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

    @classmethod
    def open(cls, name: str | os.PathLike[str], settings: Settings, placement: Placement) -> Subject:
        """Check everything that can be wrong with the request, before weights are read; raises HalveError."""
        checkpoint = open_checkpoint(os.fspath(name), placement.random_weights, placement.dtype)
        context, new = checkpoint.config.max_positions, settings.new_tokens
        if settings.prompt_tokens + new > context:
            raise HalveError(
                f"{settings.prompt_tokens} prompt tokens + {new} new tokens exceed the context of {name}, {context}: "
                f"lower --prompt-tokens or --new-tokens"
            )
        subject = cls(os.fspath(name), checkpoint, passes={settings.prompt_tokens: []})
        beyond = f"new tokens exceed the model's context of {context}"
        if settings.long == 0:
            subject.not_measured["long_prompt"] = "not asked for"
        elif settings.long + new > context:
            subject.not_measured["long_prompt"] = f"{settings.long} prompt tokens + {new} {beyond}"
        else:
            subject.passes.setdefault(settings.long, [])
        if settings.prompt_tokens + SYSTEM1_TOKENS > context:
            subject.not_measured["system1"] = f"{settings.prompt_tokens} prompt tokens + {SYSTEM1_TOKENS} {beyond}"
        reason = "the weights are random" if placement.random_weights else "a benchmark measures speed and memory only"
        subject.not_measured |= {"accuracy": reason, "perplexity": reason}
        return subject

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def load(self, settings: Settings, placement: Placement) -> None:
        """Load the model; on the CPU a process of its own does it first, for the peak memory, and is gone by then."""
        if torch.device(placement.device).type == "cuda":
            self._load_on_cuda(placement)
            return
        try:
            self.memory = peak_memory(
                self.name,
                prompt_tokens=settings.prompt_tokens,
                new_tokens=settings.new_tokens,
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

    def measure(self, settings: Settings) -> None:
        """One round: every prompt length and system 1's two generations, each timed once."""
        for prompt_tokens, times in self.passes.items():
            prompt = random_prompt(self.model, prompt_tokens, settings.seed)
            times.append(time_pass(self.model, prompt, settings.new_tokens))
        if "system1" not in self.not_measured:
            prompt = random_prompt(self.model, settings.prompt_tokens, settings.seed)
            self.first_token_ms.append(generation_ms(self.model, prompt, 1))
            self.many_tokens_ms.append(generation_ms(self.model, prompt, SYSTEM1_TOKENS))

    def warm_up(self, settings: Settings) -> None:
        """A round whose times are thrown away; on CUDA its first pass gives the peak memory."""
        prompt = random_prompt(self.model, settings.prompt_tokens, settings.seed)
        if self.model.device.type == "cuda":
            self._watch_cuda_memory(prompt, settings)
        else:
            time_pass(self.model, prompt, 2)
        if settings.long_prompt_tokens is None and settings.long in self.passes:
            self._leave_out_a_slow_prompt(prompt, settings)
        self.measure(settings)
        for times in (*self.passes.values(), self.first_token_ms, self.many_tokens_ms):
            times.clear()

    def _leave_out_a_slow_prompt(self, prompt: list[int], settings: Settings) -> None:
        ttft_ms = time_pass(self.model, prompt, 2).ttft_ms  # the pass before took the compiling and first touches
        needed_s = ttft_ms / 1e3 * settings.long / settings.prompt_tokens * (settings.runs + 1)
        if needed_s > LONG_PROMPT_BUDGET_S and settings.long != settings.prompt_tokens:
            del self.passes[settings.long]
            self.not_measured["long_prompt"] = (
                f"{settings.long} prompt tokens would take about {needed_s / 60:.0f} minutes: "
                f"ask for them with --long-prompt-tokens {settings.long}"
            )

    def _watch_cuda_memory(self, prompt: list[int], settings: Settings) -> None:
        """Note the allocator's peak during one prompt and its continuation, other models' bytes taken off."""
        device = self.model.device
        others = torch.cuda.memory_allocated(device) - self._cuda_bytes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        time_pass(self.model, prompt, settings.new_tokens)
        running = torch.cuda.max_memory_allocated(device) - others
        self.memory |= {
            "peak_running": running,
            "peak": max(running, self.memory["peak_loading"]),
            "peak_reserved": torch.cuda.max_memory_reserved(device) - others,
        }


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, float32, ..."""
    return str(dtype).removeprefix("torch.")
