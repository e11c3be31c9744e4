"""Several processes that share a model, through torch.distributed: Gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from halve.ranks.board import RankBoard
from halve.ranks.shared import SharedMemory


class RankGroup:
    """One rank of a job; see `collective.Ranks`. `board` tells why others are gone when a collective fails."""

    def __init__(self, board: RankBoard) -> None:
        self.rank, self.size, self._board = board.rank, board.size, board
        self._shared: SharedMemory | None = None
        self._apart = False

    def add(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._board.explained():
            dist.all_reduce(x)
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        widest = max(widths)  # messages of one size: what is missing is filled up and left out again
        padded = functional.pad(x, (0, widest - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths]
        with self._board.explained():
            dist.all_gather(parts, padded)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def shared(self, room: int) -> SharedMemory | None:
        if not self._apart and (self._shared is None or self._shared.room < room):
            self._shared = SharedMemory.make(self._board, room)
            self._apart = self._shared is None
        return self._shared

    def gather(self, value: Any) -> list[Any]:
        return self._board.gather(value)

    def agree(self, facts: Mapping[str, str]) -> None:
        self._board.agree(facts)
