"""What stands around a gap, refitted so that the stream behind it is the dense one's again.

With m the inputs of a linear in the compressed model and T what its outputs lack (dense_stream.py), ridge regression gives
    W' = W + alpha (T^T m) (m^T m + lambda I)^-1.
Of the last linear before a gap T is asked by the dense stream behind the gap. (ReplaceMe, arXiv 2505.02819, puts one map in
the place of several layers; here the linears that are there already take it in, on their own inputs.)

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


def same_inputs(view: BlockView, roles: list[str]) -> list[list[str]]:
    """`roles` in groups that keep the same inputs."""
    groups: dict[tuple[int, ...] | None, list[str]] = {}
    for role in roles:
        index = view.linears[role].input_index
        groups.setdefault(None if index is None else tuple(index.tolist()), []).append(role)
    return list(groups.values())


def refit_to_stream(
    view: BlockView, plan: StepPlan, stage: Stage, roles: list[str], damping: float
) -> list[dict[str, Any]]:
    """Refit linears of a stage towards the dense stream, each as far as that helps on held-out tokens; their report rows."""
    linears = [view.linears[role] for role in roles]
    problem = Problem(Calibrated.of(stage, linears[0], aims=True), linears)
    if problem.cross is None or problem.lacking is None:
        return [{"name": view.name(role), "alpha": 0.0} for role in roles]
    change, used = ridge_change(problem.hessian, problem.cross, damping, " + ".join(map(view.name, roles)))
    alphas, rows = problem.aim(change), []
    goal = problem.lacking + problem.inputs @ problem.weight.t()
    for role, linear, part, alpha in zip(roles, linears, problem.parts, alphas, strict=True):
        assert isinstance(linear.weight, Tensor)
        weight = problem.target[part].to(view.dtype(plan, role)).to(linear.weight.dtype).contiguous()
        view.replace_weight(role, weight)
        errors = {"before": problem.lacking[:, part], "after": goal[:, part] - problem.inputs @ weight.float().t()}
        size = float(goal[:, part].norm())
        shares = {f"held_out_error_{when}": float(e.norm()) / size if size else 0.0 for when, e in errors.items()}
        rows.append({"name": view.name(role), "alpha": alpha, "damping": used, **shares})
    return rows
