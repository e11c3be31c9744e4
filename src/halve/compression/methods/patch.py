"""What stands before a gap, refitted so that the stream behind the gap is the dense one's again.

With m the inputs of a linear that writes the stream, in the compressed model, and T = goal - m W^T what its outputs lack of
bringing the stream to where the dense model's is behind the gap, ridge regression gives W' = W + (T^T m) (m^T m + lambda I)^-1.
(ReplaceMe, arXiv 2505.02819, puts one map in the place of several layers; here the linear that is there already takes it
in, on its own inputs.)

Shape legend: I inputs and O outputs of the linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halve.compression.methods import obs
from halve.compression.methods.problem import Calibrated, Problem
from halve.compression.plan import StepPlan
from halve.compression.walk import BlockView, Stage


def ridge_change(hessian: Tensor, cross: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """(T^T m) (m^T m + lambda I)^-1, float32 [O, I], of m^T m [I, I] and m^T T [I, O] (both times the same factor), and the
    damping used: lambda as a share of the mean diagonal."""
    _, factor, used = obs.damped(hessian, damping, name)
    return torch.cholesky_solve(cross.double(), factor).t().float(), used


def refit_to_stream(view: BlockView, plan: StepPlan, stage: Stage, damping: float) -> dict[str, Any]:
    """Refit the linear of a stage that writes the stream as far as that helps on held-out tokens; its report row."""
    (role,) = stage.roles
    linear = view.linears[role]
    assert isinstance(linear.weight, Tensor)
    problem = Problem(Calibrated.of(stage, linear, aims=True), [linear])
    assert problem.cross is not None and problem.lacking is not None
    change, used = ridge_change(problem.hessian, problem.cross, damping, view.name(role))
    (alpha,) = problem.aim(change)
    weight = problem.target.to(view.dtype(plan, role)).to(linear.weight.dtype)
    view.replace_weight(role, weight)
    goal = problem.lacking + problem.inputs @ problem.weight.t()
    left = goal - problem.inputs @ weight.float().t()
    errors = {"before": problem.lacking, "after": left}
    shares = {f"held_out_stream_error_{when}": float(e.norm() / goal.norm()) for when, e in errors.items()}
    return {"name": view.name(role), "alpha": alpha, "damping": used, **shares}
