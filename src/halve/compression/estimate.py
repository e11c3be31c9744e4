"""How much memory a recipe will take and roughly how long: from shapes and one short measurement, before any work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from halve.compression.plan import ModelState
from halve.compression.walk import WAITING_BYTES
from halve.model.config import ModelConfig

_PASSES = 2.5  # forward, Hessian and solution of a calibrated step, in units of one forward pass (measured on GPTQ)
_RUN = 1 << 25  # weights of an embedding that are worked on at a time, about
_READ_BYTES_PER_S = 0.5e9  # reading, transforming and writing weights, on a slow disk


@dataclass(frozen=True)
class Estimate:
    """Peak memory above the interpreter's own, in bytes, and seconds. Both are estimates, the memory an upper one."""

    memory_bytes: int
    seconds: float


def estimate(
    states: Sequence[tuple[ModelState, int]],
    tokens: int,
    itemsize: int,
    device: torch.device | str,
    table_weights: int = 0,
) -> Estimate:
    """What the steps take that start from `states`, each with how many streams of `tokens` tokens it carries: none, the
    compressed model's, or the dense one's beside it.

    `itemsize`: bytes of the type computed in; `table_weights`: of the largest embedding that one of the steps quantizes:
    its codes lie in memory beside it, as bytes and packed, and some float32 copies of the rows being worked on. Measures the
    machine's matrix products for a tenth of a second.
    """
    memory = max(_memory(state, streams, tokens, itemsize) for state, streams in states)
    memory += 2 * table_weights + 4 * 4 * min(table_weights, _RUN)
    flops = sum(2.0 * state.parameters * tokens * _PASSES * streams for state, streams in states)
    moved = sum(state.linear_bytes for state, _ in states)
    seconds = (flops / _flops_per_s(device) if flops else 0.0) + moved / _READ_BYTES_PER_S
    return Estimate(memory, seconds)


def forward_seconds(parameters: int, tokens: int, device: torch.device | str) -> float:
    """Roughly how long `tokens` tokens take through `parameters` weights, many at once. Measures for a tenth of a second."""
    return 2.0 * parameters * tokens / _flops_per_s(device)


def _memory(state: ModelState, streams: int, tokens: int, itemsize: int) -> int:
    """One block or the embedding in the type computed in, the states of all tokens, what waits inside a block, H; of a
    second stream its states, its block, and 2/N Y^T of what it asks for."""
    config: ModelConfig = state.config
    blocks: dict[int | None, int] = {}
    for (layer, _), linear in state.linears.items():
        blocks[layer] = blocks.get(layer, 0) + linear.parameters
    widest = max(linear.shape.in_features for linear in state.linears.values() if linear.shape.layer is not None)
    total = max(*blocks.values(), config.vocab_size * config.hidden_size) * itemsize
    if streams:
        waiting = min(WAITING_BYTES, tokens * widest * itemsize)
        total += tokens * config.hidden_size * itemsize + waiting + 3 * 4 * widest**2
        total += max(blocks.values()) * 4  # the weights being solved, in float32
    if streams > 1:
        total += (tokens * config.hidden_size + max(blocks.values())) * itemsize + 4 * widest * config.hidden_size
    return total


@cache  # a search plans every value of its range
def _flops_per_s(device: torch.device | str) -> float:
    """Floating-point operations a second of a float32 product of the size calibration uses."""
    a = torch.randn(1024, 1024, device=device)
    torch.mm(a, a)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        float((a @ a)[0, 0])
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)
