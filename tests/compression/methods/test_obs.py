"""The pruning maths on small tensors, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from halve.compression.methods import obs
from halve.errors import DataError


def problem(inputs: int = 8, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs X [tokens, inputs] that depend on each other, and a weight [5, inputs], float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator) @ mix
    return x, torch.randn(5, inputs, dtype=torch.float64, generator=generator)


def best_error(x: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """Least squares by torch.linalg.lstsq: ||X_S W'^T - X W^T||^2."""
    target = x @ weight.t()
    solution = torch.linalg.lstsq(x[:, kept], target).solution
    return float((x[:, kept] @ solution - target).square().sum())


def test_refit_is_the_least_squares_solution() -> None:
    x, weight = problem()
    kept = [0, 2, 3, 6]
    fitted = obs.refit(weight, x.t() @ x, torch.tensor(kept))
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution.t()
    assert torch.allclose(fitted, expected, rtol=1e-9, atol=1e-9)


def test_refit_towards_outputs_that_lack_something() -> None:
    """With C = X^T T the fit is that of X W^T + T."""
    x, weight = problem()
    missing = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = [0, 2, 3, 6]
    fitted = obs.refit(weight, x.t() @ x, torch.tensor(kept), x.t() @ missing)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.t() + missing).solution.t()
    assert torch.allclose(fitted, expected, rtol=1e-9, atol=1e-9)


def test_refit_of_all_columns_changes_nothing() -> None:
    x, weight = problem()
    assert torch.allclose(obs.refit(weight, x.t() @ x, torch.arange(8)), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.5])
def test_refit_never_grows_the_calibration_error(damping: float) -> None:
    for seed in range(5):
        x, weight = problem(tokens=6, seed=seed)  # fewer tokens than inputs: H is singular
        hessian = x.t() @ x
        raised, _, _ = obs.damped(hessian, damping, "layer")
        for kept in ([0, 1, 2], [1, 4, 5, 6, 7], [7]):
            change = -weight
            change[:, kept] = 0
            before = float((x @ change.t()).square().sum())
            change[:, kept] = obs.refit(weight, raised, torch.tensor(kept)) - weight[:, kept]
            assert float((x @ change.t()).square().sum()) <= before * (1 + 1e-9)


@pytest.mark.parametrize("unit", [1, 2])
def test_adapting_removal_reports_the_least_squares_error(unit: int) -> None:
    """Whatever was removed, the loss carried through the updates is the one solved from scratch."""
    x, weight = problem()
    _, factor, _ = obs.damped(x.t() @ x, 1e-12, "layer")
    removal = obs.remove_adapting(weight, factor, unit, 8 // unit - 1)
    for count in range(1, 8 // unit):
        gone = {int(u) * unit + i for u in removal.order[:count] for i in range(unit)}
        kept = [c for c in range(8) if c not in gone]
        assert float(removal.loss[count - 1]) == pytest.approx(best_error(x, weight, kept), rel=1e-6)


@pytest.mark.parametrize("unit", [1, 2])
def test_first_choice_is_the_best_by_brute_force(unit: int) -> None:
    for seed in range(5):
        x, weight = problem(seed=seed)
        hessian = x.t() @ x
        _, factor, _ = obs.damped(hessian, 1e-12, "layer")
        units = range(8 // unit)
        adapted = [best_error(x, weight, [c for c in range(8) if c // unit != u]) for u in units]
        columns = [[c for c in range(8) if c // unit == u] for u in units]
        fixed = [float((x[:, c] @ weight[:, c].t()).square().sum()) for c in columns]
        assert int(obs.remove_adapting(weight, factor, unit, 1).order) == adapted.index(min(adapted))
        assert int(obs.remove_fixed(weight, hessian, unit, 1).order) == fixed.index(min(fixed))
        assert obs.unit_energy(weight, hessian, unit).tolist() == pytest.approx(fixed)


@pytest.mark.parametrize("unit", [1, 2])
def test_fixed_removal_reports_the_error_of_zeroing(unit: int) -> None:
    x, weight = problem()
    removal = obs.remove_fixed(weight, x.t() @ x, unit, 8 // unit)
    for count in range(1, 8 // unit + 1):
        gone = [int(u) * unit + i for u in removal.order[:count] for i in range(unit)]
        expected = float((x[:, gone] @ weight[:, gone].t()).square().sum())
        assert float(removal.loss[count - 1]) == pytest.approx(expected, rel=1e-9)


def test_many_units_go_in_rounds_and_each_once() -> None:
    x, weight = problem(inputs=300, tokens=900)
    hessian = x.t() @ x
    _, factor, _ = obs.damped(hessian, 1e-9, "layer")
    for removal in (obs.remove_adapting(weight, factor, 1, 200), obs.remove_fixed(weight, hessian, 1, 200)):
        assert len(set(removal.order.tolist())) == 200
        assert bool((removal.loss.diff() >= -1e-6 * removal.loss[-1]).all())
    adapted = obs.remove_adapting(weight, factor, 1, 200)
    kept = [c for c in range(300) if c not in set(adapted.order.tolist())]
    assert float(adapted.loss[-1]) == pytest.approx(best_error(x, weight, kept), rel=1e-4)


def test_greedy_is_near_the_best_of_all_choices() -> None:
    ours, energy = 0.0, 0.0
    for seed in range(10):
        x, weight = problem(seed=seed)
        hessian = x.t() @ x
        _, factor, _ = obs.damped(hessian, 1e-12, "layer")
        best = min(best_error(x, weight, list(kept)) for kept in itertools.combinations(range(8), 4))

        def excess(order: torch.Tensor, x=x, weight=weight, best=best) -> float:
            return best_error(x, weight, [c for c in range(8) if c not in set(order.tolist())]) / best

        ours += excess(obs.remove_adapting(weight, factor, 1, 4).order) / 10
        energy += excess(torch.argsort(obs.unit_energy(weight, hessian, 1))[:4]) / 10
    assert ours < min(1.3, energy), (ours, energy)


def test_damping_grows_until_the_hessian_factors() -> None:
    negative = torch.eye(3, dtype=torch.float64)
    negative[0, 1] = negative[1, 0] = 1.05  # an eigenvalue of -0.05
    raised, factor, used = obs.damped(negative, 0.001, "layer")
    assert used == pytest.approx(0.1)
    assert torch.allclose(factor @ factor.t(), raised)
    with pytest.raises(DataError, match=r"layer: .*not positive definite"):
        obs.damped(negative - 5 * torch.ones(3, 3).fill_diagonal_(0), 0.001, "layer")
    with pytest.raises(DataError, match="inf or nan"):
        obs.damped(torch.full((2, 2), float("nan")), 0.01, "layer")


def test_channels_never_used_go_first_and_cost_nothing() -> None:
    x, weight = problem()
    x[:, [2, 5]] = 0
    hessian = x.t() @ x
    raised, factor, _ = obs.damped(hessian, 0.01, "layer")
    removal = obs.remove_adapting(weight, factor, 1, 2)
    kept = torch.tensor([0, 1, 3, 4, 6, 7])
    assert set(obs.remove_fixed(weight, hessian, 1, 2).order.tolist()) == {2, 5}
    assert set(removal.order.tolist()) == {2, 5}
    assert torch.allclose(obs.refit(weight, raised, kept), weight[:, kept], rtol=1e-6, atol=1e-9)
