"""Hugging Face's own generate on the same shapes, in the same process: as the first system called it, and at its best.

Time to first token is that of one new token, a decode step is (t(1 + 2 steps) - t(1 + steps)) / steps, so that what a call
of generate costs once, such as recording its graphs for a new cache, is not in it: medians over the runs, batch 1.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from halve.measure.machine import bandwidth_gb_per_s, describe_device
from halve.measure.records import Record, new_record
from halve.measure.speed.timing import spread
from tools.gpu.models import SHAPES

WAYS = {
    "hf-eager": "transformers generate, eager, dynamic cache: the first system's way",
    "hf-static-compile": "transformers generate, static cache, decode step compiled (torch.compile)",
}


def _seconds(model: Any, prompt: torch.Tensor, options: dict[str, Any], new_tokens: int) -> float:
    """Wall time of one call of generate, greedy, for exactly so many tokens."""
    on_gpu = prompt.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start, mask = time.perf_counter(), torch.ones_like(prompt)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(prompt, attention_mask=mask, do_sample=False, **lengths, **options)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_peer(way: str, shape: str, prompt_tokens: int, steps: int, runs: int, device: str, command: str) -> Record:
    """One record of a way in WAYS."""
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config: Any = AutoConfig.from_pretrained(SHAPES / shape)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), device=device)
    options: dict[str, Any] = {"cache_implementation": "static"} if way == "hf-static-compile" else {}

    lengths = (1, 1 + steps, 1 + 2 * steps)
    for new_tokens in (*lengths, *lengths):  # compiles, for all lengths
        _seconds(model, prompt, options, new_tokens)
    one, some, many = ([_seconds(model, prompt, options, length) for _ in range(runs)] for length in lengths)
    step_ms = [(m - s) / steps * 1e3 for m, s in zip(many, some, strict=True)]
    low, middle, high = spread(step_ms)
    if middle <= 0:
        raise SystemExit(f"{way}: {steps} steps took {middle:.3g} ms each, so timings are too noisy here: run it again")
    weights = sum(p.nbytes for p in model.parameters())
    figures = {
        "shape": shape,
        "batch": 1,
        "device": device,
        "device_name": describe_device(device),
        "dtype": "bfloat16",
        "backend": way,
        "kernels": {WAYS[way]: 1},
        "random_weights": True,
        "prompt_tokens": prompt_tokens,
        "new_tokens": 2 * steps + 1,
        "runs": runs,
        "ttft_ms": spread(one)[1] * 1e3,
        "decode_ms_median": middle,
        "decode_ms_p10": low,
        "decode_ms_p90": high,
        "decode_tokens_per_s": 1e3 / middle,
        "weight_bytes": weights,
        "bandwidth_gb_per_s": bandwidth_gb_per_s(device),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    figures["floor_ms"] = weights / figures["bandwidth_gb_per_s"] / 1e6
    figures["floor_share"] = figures["floor_ms"] / middle
    del model
    gc.collect()
    torch.compiler.reset()
    if on_gpu:
        torch.cuda.empty_cache()
    return new_record("benchmark", way, command=command, recipe=[], **figures)
