"""Keys and values of the tokens that a model has seen.

Shape legend: B batch, T tokens of this pass, S cache slots, K key/value heads, h head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halve.model.config import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far, one pair of [B, K, S, h] buffers per layer with attention.

    `lengths` is the number of live slots: an int when all rows agree, an int64 tensor [B] when they differ.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.batch = batch
        self.capacity = capacity
        self.lengths: int | Tensor = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        for layer in config.layers:
            shape = (batch, layer.num_kv_heads, capacity, config.head_dim)
            pair = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            self.layers.append(pair if layer.has_attention else None)

    def store(
        self, layer: int, keys_BKTh: Tensor, values_BKTh: Tensor, positions: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values behind the live slots; views of one layer's slots up to `end`, [B, K, end, h].

        `positions`: slots of the pass's tokens, int64 [T] where all rows agree and [B, T] where they differ; `end`: one
        more than the last of them. `lengths` stays: it grows once per pass, when all layers have stored.
        """
        pair = self.layers[layer]
        assert pair is not None and end <= self.capacity, (end, self.capacity)
        for buffer, new in zip(pair, (keys_BKTh, values_BKTh), strict=True):
            if isinstance(self.lengths, int):
                buffer[:, :, self.lengths : end] = new
            else:
                rows = torch.arange(new.shape[0], device=new.device).unsqueeze(1)
                buffer[rows, :, positions] = new.transpose(1, 2)
        return pair[0][:, :, :end], pair[1][:, :, :end]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in (pair for pair in self.layers if pair is not None))
