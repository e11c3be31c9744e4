"""A packed weight in the layout of one kernel: the only form of it in memory, from which the stored one can be had back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from halve.quantization import QuantizedWeight, QuantSpec, dequantize, from_codes


class PreparedWeight(ABC):
    """A packed weight [O, I] as a kernel reads it.

    group_index int32 [I] or None, as in `QuantizedWeight`. Codes, scale and zero are rebuilt whenever they are asked for.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    group_index: Tensor | None

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""

    @abstractmethod
    def codes(self) -> Tensor:
        """Signed codes, int8 [O, I]."""

    @abstractmethod
    def scale(self) -> Tensor:
        """[O, G] in the dtype it was stored in."""

    @abstractmethod
    def zero(self) -> Tensor | None:
        """int8 [O, G], None where the weight is symmetric."""

    @abstractmethod
    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers of some rows (int64 [N]), [N, I] in `dtype`; only they are expanded. Raises IndexError for a row
        that is not there, where that can be told without waiting for a device."""

    def stored(self) -> QuantizedWeight:
        """The weight as a checkpoint has it."""
        return from_codes(self.codes(), self.scale(), self.zero(), self.spec, self.group_index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the codes stand for, [O, I] in `dtype` (computed in float32)."""
        return dequantize(self.codes(), self.scale(), self.zero(), self.group_index).to(dtype)
