"""Decode steps by the model's own operations, one after another: the engine for every model and every device.

Shape legend: B prompts, v tokens that this rank has of the vocabulary: on one rank all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halve.decode.sampling import TokenChooser
from halve.model.decoder import Model


class TorchStep:
    """A model and its cache; see `engines.Engine`."""

    kernel = "torch"

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.model = model
        self.cache = model.new_cache(batch, capacity)

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return True

    @classmethod
    def serves(cls, model: Model, batch: int) -> str | None:
        return None

    def step(self, tokens_B1: Tensor, choose: TokenChooser) -> Tensor:
        lengths = self.cache.lengths
        if not isinstance(lengths, int):
            # only a finished row can stand at the end: it keeps rewriting the last slot until the others are done
            lengths.clamp_(max=self.cache.capacity - 1)
        return choose(self.logits(tokens_B1))

    def logits(self, tokens_B1: Tensor) -> Tensor:
        """Of this rank's tokens, [B, v], after tokens int64 [B, 1]; the cache grows by one."""
        return self.model.own_logits(self.model.hidden(tokens_B1, self.cache))[:, 0]
