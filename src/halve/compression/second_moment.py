"""The second moment of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from halve.errors import DataError

_TILE = 128  # columns of a tile on the diagonal of a symmetric matrix, of which half is computed


def second_moment(inputs: Iterable[Tensor], in_features: int, device: torch.device | str = "cpu") -> Tensor:
    """H = 2/N X^T X over all inputs X [..., I] of one layer, float32 [I, I] (Frantar et al. 2022, section 3.1).

    Half the work of full products, since H is symmetric. Raises DataError when no token comes.
    """
    return moments(((x, None) for x in inputs), in_features, device)[0]


def moments(
    pairs: Iterable[tuple[Tensor, Tensor | None]], in_features: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None, int]:
    """H = 2/N X^T X and 2/N X^T Z, float32 [I, I] and [I, O], over pairs of inputs X [..., I] and others Z [..., O], and N;
    the second is None where Z is."""
    moment = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
    cross: Tensor | None = None
    tokens = 0
    for x, z in pairs:
        x = x.reshape(-1, x.shape[-1]).to(moment)
        tokens += x.shape[0]
        for rows, columns in upper_triangle(0, in_features):
            moment[rows, columns].addmm_(x[:, rows].t(), x[:, columns])
        if z is not None:
            z = z.reshape(-1, z.shape[-1]).to(moment)
            cross = x.t() @ z if cross is None else cross.addmm_(x.t(), z)
    if tokens == 0:
        raise DataError("no calibration token reached this layer: give at least one window of text")
    for rows, columns in upper_triangle(0, in_features):
        if rows != columns:
            moment[columns, rows] = moment[rows, columns].t()
    return moment.mul_(2 / tokens), None if cross is None else cross.mul_(2 / tokens), tokens


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
