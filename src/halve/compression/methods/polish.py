"""Codes polished one by one: each in turn becomes the best there is while all others stay (coordinate descent).

With e = w - q the error e (H + R) e^T, R the diagonal ridge of the damping, is least in q_j alone at
    q_j + (e (H + R))_j / (H_jj + R_jj),
and the code nearest to it is the best; the error never grows. A sweep takes every column of a row once. Rows are independent.

Shape legend: O output features (rows), I input features (columns), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halve.quantization import QuantSpec, decode, encode

_BLOCK = 64  # columns between two matrix products


def sweep(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    ridge: Tensor,
    spec: QuantSpec,
) -> tuple[Tensor, Tensor]:
    """int8 codes [O, I] after one sweep from those given, and how much each row's error under H + diag(ridge) fell,
    float64 [O]."""
    columns = codes.shape[1]
    size = spec.columns_per_group(columns)
    codes_IO = codes.t().contiguous()  # a column is one contiguous row
    scale_GO = scale.float().t().contiguous()
    zero_GO = None if zero is None else zero.t().contiguous()
    scales, zeros = scale_GO.repeat_interleave(size, 0), None if zero_GO is None else zero_GO.repeat_interleave(size, 0)
    values_IO = decode(codes_IO, scales, zeros)
    error_IO = target.t().contiguous() - values_IO
    curvature = (hessian.diagonal() + ridge).tolist()
    gain = torch.zeros(codes.shape[0], dtype=torch.float64, device=codes.device)
    for low in range(0, columns, _BLOCK):
        high = min(low + _BLOCK, columns)
        slope = hessian[low:high] @ error_IO
        slope.addcmul_(error_IO[low:high], ridge[low:high].unsqueeze(1))
        inner = hessian[low:high, low:high]
        for j in range(low, high):
            here = j - low
            best = values_IO[j] + slope[here] / curvature[j]
            code = encode(best, scales[j], None if zeros is None else zeros[j], spec)
            value = decode(code, scales[j], None if zeros is None else zeros[j])
            step = value - values_IO[j]
            codes_IO[j] = code
            gain += (2 * slope[here] - curvature[j] * step).mul_(step)
            error_IO[j] -= step
            slope[here + 1 :].addr_(inner[here + 1 :, here], step, alpha=-1)
    return codes_IO.t().contiguous(), gain
