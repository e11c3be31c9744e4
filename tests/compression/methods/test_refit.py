"""Refitted scales against the normal equations row by row in float64."""

from __future__ import annotations

import pytest
import torch

from halve.compression.methods.refit import refit_scales
from halve.quantization import QuantizedWeight, QuantSpec, dequantize, quantize

SPECS = [QuantSpec(b, g, s) for b in (2, 4) for g in (8, -1) for s in (True, False)]


def problem(spec: QuantSpec, seed: int = 0) -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of 6 rows of 32, a target near what they stand for, H of correlated inputs and a ridge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    target = torch.randn(6, 32, generator=generator)
    return quantize(target, spec), target, x.t() @ x / 100, torch.rand(32, generator=generator)


def error(target: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    e = (target - values).double()
    return ((e @ (hessian.double() + ridge.double().diag())) * e).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_the_normal_equations(spec: QuantSpec) -> None:
    quantized, target, hessian, ridge = problem(spec)
    codes, zero = quantized.codes(), quantized.zero
    fitted, gain = refit_scales(codes, quantized.scale, zero, target, hessian, ridge, spec)
    damped = hessian.double() + ridge.double().diag()
    size = spec.columns_per_group(32)
    for row in range(6):
        basis = torch.zeros(32 // size, 32, dtype=torch.float64)
        for column in range(32):
            group = column // size
            basis[group, column] = float(codes[row, column]) - (0 if zero is None else float(zero[row, group]))
        exact = torch.linalg.solve(basis @ damped @ basis.t(), basis @ damped @ target[row].double())
        if bool((exact > 0).all()):
            torch.testing.assert_close(fitted[row].double(), exact, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(fitted[row], quantized.scale[row])
    before = error(target, quantized.dequantize(), hessian, ridge)
    after = error(target, dequantize(codes, fitted, zero, None), hessian, ridge)
    torch.testing.assert_close(before - after, gain, rtol=1e-3, atol=1e-4 * float(before.max()))
    assert float(gain.sum()) > 0


def test_no_row_gets_worse_when_scales_are_rounded() -> None:
    """bfloat16 keeps 8 bits: a scale that moves by less than that stays, and no error grows."""
    for seed in range(20):
        spec = QuantSpec(4, 8)
        _, target, hessian, ridge = problem(spec, seed)
        quantized = quantize(target, spec, torch.bfloat16)
        fitted, gain = refit_scales(quantized.codes(), quantized.scale, None, target, hessian, ridge, spec)
        assert fitted.dtype == torch.bfloat16 and (gain >= 0).all()
        before = error(target, quantized.dequantize(), hessian, ridge)
        after = error(target, dequantize(quantized.codes(), fitted, None, None), hessian, ridge)
        assert (after <= before * (1 + 1e-5)).all()
        again, more = refit_scales(quantized.codes(), fitted, None, target, hessian, ridge, spec)
        assert (more <= 1e-3 * before).all() and again.shape == fitted.shape


def test_a_scale_that_would_not_be_positive_is_left() -> None:
    """The codes of a group point away from its target: the best scale is negative, and the row keeps its own."""
    codes = torch.tensor([[1, 1, 2, 2]], dtype=torch.int8)
    target = torch.tensor([[-1.0, -1.0, 2.0, 2.0]])
    scale = torch.ones(1, 2)
    fitted, gain = refit_scales(codes, scale, None, target, torch.eye(4), torch.zeros(4), QuantSpec(4, 2))
    assert torch.equal(fitted, scale) and gain.tolist() == [0.0]


def test_groups_of_zeros_keep_their_scale() -> None:
    codes = torch.tensor([[0, 0, 2, 2]], dtype=torch.int8)
    target = torch.tensor([[0.1, 0.0, 3.0, 3.0]])
    fitted, gain = refit_scales(codes, torch.ones(1, 2), None, target, torch.eye(4), torch.zeros(4), QuantSpec(4, 2))
    assert fitted[0, 0] == 1.0 and float(fitted[0, 1]) == pytest.approx(1.5, rel=1e-6)
    assert float(gain) == pytest.approx(2.0, rel=1e-6)  # 2 * 1^2 before, 0 after


def test_rows_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, target, hessian, ridge = problem(QuantSpec(4, 8))
    arguments = (quantized.codes(), quantized.scale, None, target, hessian, ridge, QuantSpec(4, 8))
    whole, _ = refit_scales(*arguments)
    monkeypatch.setattr("halve.compression.methods.refit._ROW_BYTES", 2 * 8 * 16)
    torch.testing.assert_close(refit_scales(*arguments)[0], whole, rtol=1e-5, atol=1e-6)
