"""The second moment of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halve.errors import DataError

_TILE = 128  # columns of a tile on the diagonal of a symmetric matrix, of which half is computed


class Hessian:
    """Running H = 2/N X^T X over the inputs X [N, I] of one layer, float32 [I, I] (Frantar et al. 2022, section 3.1)."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs x [..., I]: half the work of a full product, since H is symmetric."""
        x = x.reshape(-1, x.shape[-1]).to(self._sum)
        self.tokens += x.shape[0]
        for rows, columns in upper_triangle(0, x.shape[1]):
            self._sum[rows, columns].addmm_(x[:, rows].t(), x[:, columns])

    def value(self) -> Tensor:
        """H [I, I]; consumes the accumulator. Raises DataError when no token was added or an input was not finite."""
        if self.tokens == 0:
            raise DataError("no calibration token reached this layer: give at least one window of text")
        total = self._sum
        for rows, columns in upper_triangle(0, total.shape[0]):
            if rows != columns:
                total[columns, rows] = total[rows, columns].t()
        del self._sum
        return total.mul_(2 / self.tokens)


def upper_triangle(low: int, high: int) -> Iterator[tuple[slice, slice]]:
    """Tiles (rows, columns) that cover a square matrix on and above its diagonal, those off it as large as can be: matrix
    products of large squares run at the highest rate."""
    if high - low <= _TILE:
        yield slice(low, high), slice(low, high)
        return
    middle = (low + high) // 2
    yield from upper_triangle(low, middle)
    yield slice(low, middle), slice(middle, high)
    yield from upper_triangle(middle, high)
