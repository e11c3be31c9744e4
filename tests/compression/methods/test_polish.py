"""Polished codes against a loop over single codes in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from halve.compression.methods import polish
from halve.compression.methods.polish import sweep
from halve.quantization import QuantizedWeight, QuantSpec, dequantize, quantize
from tests.compression.methods.test_refit import SPECS, error, problem


def values(quantized: QuantizedWeight, codes: torch.Tensor) -> torch.Tensor:
    return dequantize(codes, quantized.scale, quantized.zero, None)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_a_loop_over_single_codes(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish, "_BLOCK", 12)  # two whole blocks and a part of one
    quantized, target, hessian, ridge = problem(spec)
    codes = quantized.codes()
    made, gain = sweep(codes, quantized.scale, quantized.zero, target, hessian, ridge, spec)
    damped, size = hessian.double() + ridge.double().diag(), spec.columns_per_group(32)
    expected = codes.double()
    for row, column in itertools.product(range(6), range(32)):
        # every code there is, tried
        best = (float("inf"), 0.0)
        for code in range(spec.qmin, spec.qmax + 1):
            expected[row, column] = code
            zeros = 0.0 if quantized.zero is None else quantized.zero[row].double().repeat_interleave(size)
            e = target[row].double() - (expected[row] - zeros) * quantized.scale[row].double().repeat_interleave(size)
            best = min(best, (float(e @ damped @ e), float(code)))
        expected[row, column] = best[1]
    assert torch.equal(made.double(), expected)
    before, after = (error(target, values(quantized, c), hessian, ridge) for c in (codes, made))
    torch.testing.assert_close(before - after, gain, rtol=1e-3, atol=1e-4 * float(before.max()))


def test_the_error_never_grows_and_sweeps_come_to_rest() -> None:
    for seed in range(10):
        spec = SPECS[seed % len(SPECS)]
        quantized, target, hessian, ridge = problem(spec, seed)
        codes = quantized.codes()
        for _ in range(50):
            made, gain = sweep(codes, quantized.scale, quantized.zero, target, hessian, ridge, spec)
            assert float(gain.min()) >= -1e-4 * float(error(target, values(quantized, codes), hessian, ridge).max())
            if torch.equal(made, codes):
                break
            codes = made
        else:
            pytest.fail("still changing after 50 sweeps")


def test_uncorrelated_inputs_leave_nothing_to_polish() -> None:
    spec = QuantSpec(4, 8)
    quantized, target, _, ridge = problem(spec)
    codes = quantized.codes()
    made, gain = sweep(codes, quantized.scale, None, target, torch.eye(32), ridge, spec)
    assert torch.equal(made, codes) and not gain.any()
    assert torch.equal(made, quantize(target, spec).codes())
