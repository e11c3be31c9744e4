"""Clocks and statistics of a benchmark: one timed pass, its summary, and the least time the memory allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halve.decode.generate import Decoder, generate
from halve.decode.sampling import Sampling
from halve.model.decoder import Model


class Stopwatch:
    """Marks points in time on the CPU clock, or in the GPU's stream, where marking does not wait for the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        """Milliseconds between neighbouring marks."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]
        return [(b - a) * 1e3 for a, b in zip(self._seconds, self._seconds[1:], strict=False)]


@dataclass(frozen=True)
class PassTimes:
    """One prompt continued once: time to the first token, then every decode step, in milliseconds, and what ran the steps."""

    ttft_ms: float
    steps_ms: list[float]
    decode_kernel: str = ""


@torch.inference_mode()
def time_pass(model: Model, prompt: list[int], new_tokens: int) -> PassTimes:
    """Prefill `prompt`, then decode greedily to `new_tokens` tokens (the first comes from the prefill).

    The time to the first token includes making the cache. Nothing waits for the device in between.
    """
    watch = Stopwatch(model.device)
    decoder = Decoder(model, [prompt], len(prompt) + new_tokens - 1, Sampling())
    tokens = decoder.prefill()
    watch.mark()
    for _ in range(new_tokens - 1):
        tokens = decoder.step(tokens)
        watch.mark()
    ttft, *steps = watch.laps_ms()
    return PassTimes(ttft, steps, decoder.kernel)


def generation_ms(model: Model, prompt: list[int], new_tokens: int) -> float:
    """Wall time of one whole `generate` call, the tokens fetched from the device."""
    start = time.perf_counter()
    generate(model, [prompt], max_new_tokens=new_tokens)
    return (time.perf_counter() - start) * 1e3


def random_prompt(model: Model, tokens: int, seed: int) -> list[int]:
    """Token ids drawn evenly from the vocabulary; the same for the same seed, length and vocabulary size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile, linearly interpolated."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return low.item(), middle.item(), high.item()


def kv_bytes_per_step(model: Model, live_tokens: int) -> int:
    """Bytes of keys and values one query attends to when `live_tokens` tokens, itself included, are in the cache."""
    total = 0
    for layer in model.config.layers:
        seen = live_tokens if layer.sliding_window is None else min(live_tokens, layer.sliding_window)
        total += 2 * layer.num_kv_heads * model.config.head_dim * seen * model.dtype.itemsize
    return total


def step_floor_ms(model: Model, prompt_tokens: int, new_tokens: int, bandwidth_gb_per_s: float) -> float:
    """Least time of a decode step in milliseconds: bytes it has to read (weights, keys, values) / bandwidth.

    Keys and values grow by a token a step; their mean over the steps is taken.
    """
    kv = [kv_bytes_per_step(model, prompt_tokens + step) for step in range(1, new_tokens)]
    return (model.step_bytes() + sum(kv) / len(kv)) / (bandwidth_gb_per_s * 1e9) * 1e3
