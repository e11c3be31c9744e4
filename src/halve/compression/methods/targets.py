"""Weights moved towards what the dense stream asks of a linear.

With y the inputs in the compressed stream, H = 2/N Y^T Y, and T [N, O] what the outputs Y W^T lack, least squares gives
    W* = W + alpha C^T (H + R)^-1,    C = 2/N Y^T T [I, O],
R being the damping. For any Q, ||Y W*^T + rest - Y Q^T||^2 = ||Y (W* - Q)^T||^2 + constant, since the rest is orthogonal to Y:
a quantizer that minimises its error on H takes W* in place of W, and nothing else changes (Qronos, arXiv 2505.11695).
T = (X - Y) W^T is GPTAQ's (arXiv 2504.02692), alpha QEP's strength of propagation (arXiv 2504.09629).

Shape legend: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from halve.compression.dense_stream import Aim
from halve.model.linear import Linear

ALPHAS = (0.0, 0.25, 0.5)  # 1 is often nearest to the dense stream, and yet gives the worse model


def lacking_moment(linear: Linear, weight: Tensor, hessian: Tensor, cross: Tensor, drifts: bool) -> Tensor:
    """C = 2/N Y^T T [S, K] of a linear whose weight [K, S] reads the kept inputs, of Hessian [S, S].

    `cross`: 2/N Y^T of all the inputs' drift [I, I] where it `drifts`, else of the goal of all outputs [I, O].
    """
    if linear.input_index is not None:
        cross = cross[linear.input_index]
    if drifts:
        return (cross if linear.input_index is None else cross[:, linear.input_index]) @ weight.t()
    if linear.output_index is not None:
        cross = cross[:, linear.output_index]
    return cross - hessian @ weight.t()


def lacking_outputs(linear: Linear, weight: Tensor, aim: Aim) -> Tensor:
    """T [N, K]: what the outputs of a weight [K, S] lack on one batch."""
    if aim.drift is not None:
        drift = aim.drift if linear.input_index is None else aim.drift[:, linear.input_index]
        return drift @ weight.t()
    assert aim.goal is not None
    goal = aim.goal if linear.output_index is None else aim.goal[:, linear.output_index]
    inputs = aim.inputs if linear.input_index is None else aim.inputs[:, linear.input_index]
    return goal - inputs @ weight.t()


def best_alpha(lacking: Tensor, moved: Tensor) -> float:
    """The one of ALPHAS whose ||T - alpha Y D^T||^2 is least, of T [N, O] and Y D^T [N, O] on held-out tokens."""
    both, square = (float((moved * t).sum(dtype=torch.float64)) for t in (lacking, moved))
    return min(ALPHAS, key=lambda alpha: alpha * (alpha * square - 2 * both))


def thinned(aims: Iterable[Aim], rows: int) -> Aim:
    """At most about `rows` tokens of all batches, evenly."""
    batches = list(aims)
    step = max(1, sum(batch.inputs.shape[0] for batch in batches) // rows)
    parts = [[None if t is None else t[::step] for t in batch] for batch in batches]
    joined = [
        None if each[0] is None else torch.cat([t for t in each if t is not None]) for each in zip(*parts, strict=True)
    ]
    assert joined[0] is not None
    return Aim(joined[0], joined[1], joined[2])
