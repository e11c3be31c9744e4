"""The linear layer: a weight (dense or packed), optional kept inputs and outputs, optional bias, one backend.

Shape legend: N rows of input, I logical input features, O logical output features, S kept inputs, K kept outputs.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve import kernels
from halve.quantization import QuantizedWeight


class LinearParts(TypedDict, total=False):
    """Everything a Linear is made of, for `Linear.replaced`."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    input_index: Tensor | None
    output_index: Tensor | None
    in_features: int
    out_features: int


class Linear(nn.Module):
    """y = scatter(W gather(x)) + bias, the form every compressed layer takes.

    weight: floating [K, S] or QuantizedWeight [K, S].
    input_index int64 [S] or None: the columns of x [..., I] the weight reads (None: all).
    output_index int64 [K] or None: the places of y [..., O] the rows write, the rest are 0 (None: all).
    bias floating [O] or None: added to every output, also to those whose row is gone.
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        input_index: Tensor | None = None,
        output_index: Tensor | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        # a plain attribute: never trained, and only a dense weight could be a Parameter
        self._weight: Tensor | QuantizedWeight | kernels.PreparedWeight = weight
        self.bias = bias
        self.input_index = input_index
        self.output_index = output_index
        kept_out, kept_in = weight.shape
        self.in_features = kept_in if in_features is None else in_features
        self.out_features = kept_out if out_features is None else out_features
        assert input_index is not None or kept_in == self.in_features
        assert output_index is not None or kept_out == self.out_features
        self._matmul: kernels.Matmul | None = None

    def replaced(self, **parts: Unpack[LinearParts]) -> Linear:
        """A copy with some parts exchanged and the others shared; no kernel is chosen for it yet."""
        kept: dict[str, Any] = {n: getattr(self, n) for n in LinearParts.__annotations__ if n not in parts}
        return Linear(**kept, **parts)

    @property
    def weight(self) -> Tensor | QuantizedWeight:
        """The weight as a checkpoint has it; where a kernel keeps a packed one in its own form, rebuilt at every call."""
        return self._weight.stored() if isinstance(self._weight, kernels.PreparedWeight) else self._weight

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def quantized(self) -> bool:
        return not isinstance(self._weight, Tensor)

    @property
    def matmul(self) -> kernels.Matmul | None:
        """The product that serves this layer, None while none is chosen."""
        return self._matmul

    @property
    def kernel(self) -> str | None:
        """Name of the kernel that serves this layer, None while none is chosen."""
        return None if self._matmul is None else self._matmul.kernel

    @property
    def nbytes(self) -> int:
        """Bytes of everything this layer keeps in memory for its weight, bias and indices."""
        extra = (self.bias, self.input_index, self.output_index)
        return self._weight.nbytes + sum(t.nbytes for t in extra if t is not None)

    def select_backend(self, name: str, dtype: torch.dtype) -> str:
        """Choose the kernel for this layer once; returns the name of the kernel that will run.

        The weight is from then on held as that kernel reads it, and no longer as it was stored.
        `name` is "auto" or one of `kernels.BACKENDS`. Raises HalveError when an explicit choice cannot serve this weight.
        """
        self._matmul = kernels.select(name, self.weight, dtype)
        self._weight = self._matmul.weight
        return self._matmul.kernel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_matmul": None}  # a kernel may hold addresses: a copy prepares its own

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [K, S] as numbers."""
        weight = self._weight
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., I] of the weight by their numbers int64 [...]: what an embedding is. A dense weight's as they are, those
        of a packed one expanded in `dtype`."""
        weight = self._weight
        if isinstance(weight, Tensor):
            return functional.embedding(rows, weight)
        return weight.look_up(rows.flatten(), dtype).view(*rows.shape, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_index is not None:
            x = x.index_select(-1, self.input_index)
        if self._matmul is None:
            self._matmul = kernels.select("auto", self.weight, x.dtype)  # the weight may still be written out
        assert self._matmul is not None
        y = self._matmul(x)
        if self.output_index is not None:
            full = y.new_zeros(*y.shape[:-1], self.out_features)
            y = full.index_copy_(-1, self.output_index, y)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        weight = self._weight
        kind = str(weight.dtype) if isinstance(weight, Tensor) else f"int{weight.spec.bits}"
        return f"in={self.in_features}, out={self.out_features}, weight={tuple(weight.shape)} {kind}"
