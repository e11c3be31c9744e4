"""Matrix products with a stored weight: y [N, K] = x [N, S] W^T, one class per backend.

A backend is chosen once per layer, when the model is loaded; `kernel` names what really runs and is recorded.
Adding one: a module with a `Matmul` subclass whose `serves` says which weights it takes, and an entry in BACKENDS.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from halve.errors import HalveError
from halve.kernels.cpu import CpuMatmul
from halve.kernels.prepared import PreparedWeight
from halve.kernels.reference import ReferenceMatmul
from halve.kernels.triton_backend import TritonMatmul
from halve.quantization import QuantizedWeight


class Matmul(Protocol):
    """One layer's weight, prepared for one kernel."""

    kernel: str

    @property
    def weight(self) -> Tensor | QuantizedWeight | PreparedWeight:
        """As this kernel keeps it; the layer drops the form it was given."""
        ...

    def __init__(self, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> None: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., S] -> [..., K] in x's dtype."""
        ...

    @classmethod
    def serves(cls, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> str | None:
        """None when this backend can run the weight, else the reason why not."""
        ...


# best first: "auto" takes the first that serves the weight
BACKENDS: dict[str, type[Matmul]] = {"cpu": CpuMatmul, "triton": TritonMatmul, "reference": ReferenceMatmul}


def select(name: str, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Matmul:
    """The Matmul of backend `name`, or of the first that serves `weight` for "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise HalveError(f"unknown backend {name!r}: use auto or one of {', '.join(BACKENDS)}")
    reasons = []
    for candidate, matmul in BACKENDS.items():
        if name not in ("auto", candidate):
            continue
        reason = matmul.serves(weight, dtype)
        if reason is None:
            return matmul(weight, dtype)
        reasons.append(f"{candidate}: {reason}")
    raise HalveError(f"backend {name!r} cannot run a {tuple(weight.shape)} weight ({'; '.join(reasons)}): use auto")
