"""The backend that every kernel answers to, on a case worked out by hand."""

from __future__ import annotations

import torch

from halve.kernels.reference import ReferenceMatmul
from halve.quantization import QuantSpec, from_codes


def test_packed_by_hand() -> None:
    codes = torch.tensor([[1, -2, 3, 4], [0, 7, -8, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    zero = torch.tensor([[1, 0], [-1, 2]], dtype=torch.int8)
    weight = from_codes(codes, scale, zero, QuantSpec(4, 2, symmetric=False))
    # rows: (0, -1.5, 6, 8) and (1, 8, -2.5, -0.25); x = (1, 2, 3, 4)
    matmul = ReferenceMatmul(weight, torch.float32)
    assert matmul.kernel == "reference-int4"
    assert torch.equal(matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), torch.tensor([[47.0, 8.5]]))


def test_dense_by_hand() -> None:
    matmul = ReferenceMatmul(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.float32)
    assert matmul.kernel == "torch.linear"
    assert torch.equal(matmul(torch.tensor([[[2.0, 1.0]]])), torch.tensor([[[4.0, 5.0]]]))
