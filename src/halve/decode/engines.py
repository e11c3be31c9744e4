"""What can run the decode steps of a model, best first: fused GPU kernels, one call into C, or the model's own operations.

Adding one: a module with an `Engine` whose `serves` says which models it takes, and an entry in ENGINES.

Shape legend: B prompts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from halve.decode.cpu_step import CpuStep
from halve.decode.gpu_step import GpuStep
from halve.decode.sampling import TokenChooser
from halve.decode.torch_step import TorchStep
from halve.model.cache import KVCache
from halve.model.decoder import Model


class Engine(Protocol):
    """Decode steps of one model, for `batch` prompts in a cache of at least `capacity` slots."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None: ...

    @property
    def cache(self) -> KVCache:
        """Where the prefill puts the prompts; empty at first."""
        ...

    @property
    def kernel(self) -> str:
        """What runs, for records; final after the first step."""
        ...

    def step(self, tokens_B1: Tensor, choose: TokenChooser) -> Tensor:
        """Feed tokens int64 [B, 1], return the next ones; the cache grows by one."""
        ...

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """Whether it is for models on this device at all."""
        ...

    @classmethod
    def serves(cls, model: Model, batch: int) -> str | None:
        """None when it can run this model, on a device of its own, else the reason why not."""
        ...


# best first: the first that serves runs; the last serves every model
ENGINES: dict[str, type[Engine]] = {"gpu": GpuStep, "cpu": CpuStep, "torch": TorchStep}


def start_engine(model: Model, batch: int, capacity: int) -> tuple[Engine, dict[str, str]]:
    """The best engine that serves the model, and why those before it that are for its device do not, by name."""
    passed_over: dict[str, str] = {}
    for name, engine in ENGINES.items():
        if not engine.runs_on(model.device):
            continue
        reason = engine.serves(model, batch)
        if reason is None:
            return engine(model, batch, capacity), passed_over
        passed_over[name] = reason
    raise AssertionError(passed_over)
