"""Scales refitted by least squares while the codes stay.

The numbers a row's codes stand for are linear in its scales: q = sum over groups a of s_a c_a, c_a the codes of group a
less their zero point. With e = w - q, the error e H e^T is least where M s = b, M_ab = c_a H c_b^T, b_a = c_a H w^T; as a
change d of the scales there are, M d = r, r_a = c_a H e^T. Rows are independent.

Shape legend: O output features (rows), I input features (columns), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halve.quantization import QuantSpec

_ROW_BYTES = 1 << 26  # of the matrices M solved at a time


def refit_scales(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    ridge: Tensor,
    spec: QuantSpec,
) -> tuple[Tensor, Tensor]:
    """Scales [O, G] in their dtype for int8 codes [O, I] of a target [O, I], and how much each row's error under
    H + diag(ridge) fell, float64 [O].

    A row whose error would not fall once its scales are rounded to their dtype, or that would have one that is not
    positive, keeps those it has.
    """
    rows_at_once = max(1, _ROW_BYTES // (8 * scale.shape[1] ** 2))
    fitted, gains = scale.clone(), torch.zeros(codes.shape[0], dtype=torch.float64, device=codes.device)
    for first in range(0, codes.shape[0], rows_at_once):
        rows = slice(first, first + rows_at_once)
        part = codes[rows].float()
        if zero is not None:
            part -= zero[rows].float().repeat_interleave(spec.columns_per_group(codes.shape[1]), 1)
        fitted[rows], gains[rows] = _refit(part, scale[rows], target[rows], hessian, ridge)
    return fitted, gains


def _refit(codes: Tensor, scale: Tensor, target: Tensor, hessian: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    rows, groups = scale.shape
    size = codes.shape[1] // groups
    error = target - (codes.view(rows, groups, size) * scale.float().unsqueeze(-1)).view_as(codes)
    slope = error @ hessian + error * ridge
    lacking = (slope * codes).view(rows, groups, size).sum(-1).double()
    moment = torch.zeros(rows, groups, groups, dtype=torch.float64, device=codes.device)
    squares = (codes.square() * ridge).view(rows, groups, size).sum(-1)
    for group in range(groups):  # the rest of a row's matrix is known by symmetry
        low, high = group * size, (group + 1) * size
        product = codes[:, low:high] @ hessian[low:high, low:]
        parts = product.mul_(codes[:, low:]).view(rows, groups - group, size).sum(-1).double()
        moment[:, group, group:] = parts
        moment[:, group:, group] = parts
    diagonal = moment.diagonal(dim1=1, dim2=2)
    diagonal += squares
    raised = moment.clone()
    # a group of zeros has no say: its scale stays
    raised.diagonal(dim1=1, dim2=2).add_((diagonal == 0).double() + 1e-9 * diagonal.mean(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(raised)
    change = torch.cholesky_solve(lacking.unsqueeze(-1), factor).squeeze(-1)
    fitted = (scale.double() + change).to(scale.dtype)
    change = fitted.double() - scale.double()
    gain = 2 * (change * lacking).sum(1) - (change.unsqueeze(1) @ moment @ change.unsqueeze(-1)).flatten()
    good = (failed == 0) & (fitted > 0).all(1) & torch.isfinite(fitted).all(1) & (gain > 0)
    return torch.where(good.unsqueeze(1), fitted, scale), torch.where(good, gain, 0.0)
