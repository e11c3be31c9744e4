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
    Of a model whose keys depend on the length of the text (`ModelConfig.length_limit`) the `tokens` are kept as well, int64
    [B, S], and whether the keys are `long`, those of a text beyond the limit: to make them again when it grows beyond.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.batch = batch
        self.capacity = capacity
        self.lengths: int | Tensor = 0
        self.limit, self.long = config.length_limit, False
        self.tokens = None if self.limit is None else torch.zeros(batch, capacity, dtype=torch.int64, device=device)
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
    def end(self) -> int:
        """Live slots of the longest row."""
        return self.lengths if isinstance(self.lengths, int) else int(self.lengths.max())

    def positions(self, count: int) -> Tensor:
        """Slots of the next `count` tokens, int64 [T] where all rows agree and [B, T] where they differ."""
        if isinstance(self.lengths, int):
            return torch.arange(self.lengths, self.lengths + count)
        return self.lengths.unsqueeze(1) + torch.arange(count, device=self.lengths.device)

    def outgrown(self, tokens_BT: Tensor) -> bool:
        """Keep the next tokens; whether with them the keys that are there are those of another length of text."""
        if self.tokens is None or self.limit is None:
            return False
        before, count = self.end, tokens_BT.shape[1]
        positions = self.positions(count).to(self.tokens.device).expand(tokens_BT.shape)
        self.tokens.scatter_(1, positions, tokens_BT)
        was, self.long = self.long, before + count > self.limit
        return before > 0 and was != self.long

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in (pair for pair in self.layers if pair is not None))
