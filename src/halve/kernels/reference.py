"""The slow, obvious backend every kernel answers to: expand the weight, multiply."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from halve.quantization import QuantizedWeight


class ReferenceMatmul:
    """Dense weights go to torch's matmul; packed ones are expanded at every call."""

    def __init__(self, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.kernel = "torch.linear" if isinstance(weight, Tensor) else f"reference-int{weight.spec.bits}"

    @classmethod
    def serves(cls, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> str | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize(x.dtype)
        return functional.linear(x, weight)
