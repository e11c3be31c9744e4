"""Scales of groups chosen before any code is: the whole range, or the share of it that rounds best.

Shape legend: O output features (rows), I input features (columns), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halve.quantization import QuantSpec, nearest, scale_and_zero

SCALES = ("minmax", "mse")
SHRINKS = tuple(1 - 0.05 * step for step in range(1, 9))  # shares of the full range that scale="mse" tries
_SEARCH_ELEMENTS = 1 << 18  # weights whose range is searched at a time: the copies stay in the cache


def group_scales(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, importance: Tensor, method: str
) -> tuple[Tensor, Tensor | None]:
    """Scale [O, G] and zero [O, G] of weight [O, I] before any code is chosen.

    minmax: the group's full range. mse: of the ranges in SHRINKS times it, per group the one whose nearest codes have
    the least squared error, each column weighted by `importance` [I] (the diagonal of H).
    """
    columns = spec.columns_per_group(weight.shape[1])
    groups = weight.shape[1] // columns
    parts = []
    for rows in weight.split(max(1, _SEARCH_ELEMENTS // weight.shape[1])):
        # columns of a group outermost: what is broadcast below is then contiguous, which is several times faster
        grouped_COG = rows.float().view(-1, groups, columns).permute(2, 0, 1).contiguous()
        ends = torch.stack(torch.aminmax(grouped_COG, dim=0), -1)
        scale, zero = scale_and_zero(ends, spec, scale_dtype)
        if method == "mse":
            importance_CG = importance.float().view(groups, columns).t()
            importance_COG = importance_CG.unsqueeze(1).expand(grouped_COG.shape).contiguous()
            scale, zero = _search(grouped_COG, ends, importance_COG, scale, zero, spec)
        parts.append((scale, zero))
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def _search(
    grouped_COG: Tensor, ends: Tensor, importance_COG: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """The best of the candidate ranges for groups whose full ranges are `ends` [O, G, 2]."""

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        miss = nearest(grouped_COG, scale, zero, spec).sub_(grouped_COG)
        return miss.square_().mul_(importance_COG).sum(0)

    least = error(scale, zero)
    for shrink in SHRINKS:
        tried, tried_zero = scale_and_zero(ends * shrink, spec, scale.dtype)
        tried_error = error(tried, tried_zero)
        better = tried_error < least
        least = torch.where(better, tried_error, least)
        scale = torch.where(better, tried, scale)
        if zero is not None and tried_zero is not None:
            zero = torch.where(better, tried_zero, zero)
    return scale, zero
