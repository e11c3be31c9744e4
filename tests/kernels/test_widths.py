"""A width of bits that a kernel does not read is a reason, from every kernel, and the reference runs it."""

from __future__ import annotations

import pytest
import torch

from halve import kernels, quantization
from halve.errors import HalveError
from halve.kernels import triton_backend
from halve.quantization import QuantSpec, quantize


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
@pytest.mark.parametrize("backend", [name for name in kernels.BACKENDS if name != "reference"])
def test_unknown_widths_are_refused_by_name(backend: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "PACKABLE_BITS", range(1, 9))
    monkeypatch.setattr(triton_backend, "runs_on", lambda device: True)
    weight = quantize(torch.randn(32, 64), QuantSpec(bits, 32))
    with pytest.raises(HalveError, match=f"{backend}: (reads codes of .* bits, not {bits}|.*not built|.*Triton)"):
        kernels.select(backend, weight, torch.float32)
    product = kernels.select("reference", weight, torch.float32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(product(x), x @ weight.dequantize().T)
