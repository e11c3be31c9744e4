"""Targets of the dense stream: the identity they rest on, in float64, and how far to go."""

from __future__ import annotations

import pytest
import torch

from halve.compression.dense_stream import Aim
from halve.compression.methods.gptq import factorize
from halve.compression.methods.targets import best_alpha, lacking_moment, lacking_outputs, thinned
from halve.compression.second_moment import moments
from halve.model.linear import Linear

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 300, 12, generator=GENERATOR)
Y = X + 0.3 * Y @ torch.randn(12, 12, generator=GENERATOR)
W = torch.randn(5, 12, generator=GENERATOR)
GOAL = torch.randn(300, 5, generator=GENERATOR)


def target(linear: Linear, aim: Aim) -> torch.Tensor:
    """W* at alpha 1 without damping."""
    hessian, cross, tokens = moments([(aim.inputs, aim.goal if aim.drift is None else aim.drift)], linear.in_features)
    assert cross is not None and tokens == 300
    if linear.input_index is not None:
        hessian = hessian[linear.input_index][:, linear.input_index]
    weight = linear.dense_weight()
    lacking = lacking_moment(linear, weight, hessian, cross, aim.drift is not None)
    return weight + factorize(hessian, 0.0, True, "w").solve(lacking).t()


@pytest.mark.parametrize("aim", [Aim(Y, drift=X - Y), Aim(Y, goal=GOAL)], ids=["drift", "goal"])
def test_the_target_is_the_least_squares_weight(aim: Aim) -> None:
    """||X W^T - Y Q^T||^2 = ||Y (W* - Q)^T||^2 + a constant, for any Q; of inputs that are kept in part, too."""
    wanted = X.double() @ W.double().t() if aim.drift is not None else GOAL.double()
    best = target(Linear(W), aim)
    exact = torch.linalg.lstsq(Y.double(), wanted).solution.t()
    torch.testing.assert_close(best.double(), exact, rtol=1e-3, atol=1e-4)
    constants = []
    for seed in range(3):
        q = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        whole = (wanted - Y.double() @ q.t()).square().sum()
        constants.append(float(whole - (Y.double() @ (exact - q).t()).square().sum()))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("drifts", [True, False])
def test_kept_inputs_and_outputs(drifts: bool) -> None:
    """A linear that reads columns 1, 4, 7, 9 and writes rows 0 and 3 of 5: the least-squares fit of just these."""
    inputs, outputs = torch.tensor([1, 4, 7, 9]), torch.tensor([0, 3])
    weight = W[outputs][:, inputs]
    linear = Linear(weight, None, inputs, outputs, 12, 5)
    aim = Aim(Y, drift=X - Y) if drifts else Aim(Y, goal=GOAL)
    wanted = X[:, inputs].double() @ weight.double().t() if drifts else GOAL[:, outputs].double()
    exact = torch.linalg.lstsq(Y[:, inputs].double(), wanted).solution.t()
    torch.testing.assert_close(target(linear, aim).double(), exact, rtol=1e-3, atol=1e-4)
    lacking = wanted - Y[:, inputs].double() @ weight.double().t()
    torch.testing.assert_close(lacking_outputs(linear, weight, aim).double(), lacking, rtol=1e-4, atol=1e-4)


def test_the_best_alpha_by_hand() -> None:
    """T = 1, and the change moves outputs by 2: 0.5 brings all of it; by 4, 0.25; moving by -1 helps at no alpha; by 10, a
    little is too much."""
    lacking = torch.ones(4, 1)
    assert best_alpha(lacking, torch.full((4, 1), 2.0)) == 0.5
    assert best_alpha(lacking, torch.full((4, 1), 4.0)) == 0.25
    assert best_alpha(lacking, torch.full((4, 1), -1.0)) == 0.0
    assert best_alpha(lacking, torch.full((4, 1), 10.0)) == 0.0
    assert best_alpha(lacking, torch.zeros(4, 1)) == 0.0


def test_tokens_are_thinned_evenly_over_batches() -> None:
    batches = [Aim(torch.arange(10.0).unsqueeze(1) + 10 * i, goal=torch.arange(10.0).unsqueeze(1)) for i in range(2)]
    few = thinned(batches, 4)
    assert few.inputs.flatten().tolist() == [0.0, 5.0, 10.0, 15.0] and few.drift is None
    assert few.goal is not None and few.goal.flatten().tolist() == [0.0, 5.0, 0.0, 5.0]
