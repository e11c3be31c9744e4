"""Pruned layers for any PyTorch model: a narrower product in the place of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from halve.dropin import DropIn
from halve.errors import RecipeError
from halve.linear import Linear
from halve.methods import obs
from halve.methods.gptq import Hessian
from halve.pruning import check_fraction, column_norms, keep_inputs, keep_outputs, kept_count, largest, row_norms


@torch.inference_mode(False)
@torch.no_grad()
def prune_linear(
    layer: nn.Linear | DropIn,
    inputs: Tensor | Iterable[Tensor] | None = None,
    *,
    input_fraction: float = 0.0,
    output_fraction: float = 0.0,
    refit: bool = True,
    damping: float = 0.01,
) -> DropIn:
    """A drop-in for `layer` (left as it is) without a share of its input channels, of its output channels, or both.

    inputs: what the layer reads in use, floating [..., I], or an iterable of such; the input channels that matter least
    to the output then go (`halve.methods.obs`) and the others are refitted unless refit=False. None: the columns of
    least L1 norm go. Of the outputs the rows of least L1 norm go; they become 0, or their bias. A quantized drop-in
    loses codes and cannot be refitted. Fractions lie in [0, 1) and are rounded down to channels. Raises RecipeError.
    """
    check_fraction("prune_linear input_fraction", input_fraction)
    check_fraction("prune_linear output_fraction", output_fraction)
    if isinstance(layer, DropIn):
        linear = layer.linear(layer.weight.dtype if isinstance(layer.weight, Tensor) else torch.float32)
    else:
        linear = Linear(layer.weight.detach(), None if layer.bias is None else layer.bias.detach().clone())
    columns = kept_count(linear.weight.shape[1], input_fraction)
    if inputs is None:
        linear = keep_inputs(linear, largest(column_norms(linear), columns))
    else:
        linear = _keep_fitted(linear, inputs, columns, refit, damping)
    rows = kept_count(linear.weight.shape[0], output_fraction)
    return DropIn(keep_outputs(linear, largest(row_norms(linear), rows)))


def _keep_fitted(
    linear: Linear, inputs: Tensor | Iterable[Tensor], columns: int, refit: bool, damping: float
) -> Linear:
    if refit and not isinstance(linear.weight, Tensor):
        raise RecipeError("a quantized layer cannot be refitted: prune it before quantizing, or use refit=False")
    accumulator = Hessian(linear.in_features, linear.weight.device)
    for x in [inputs] if isinstance(inputs, Tensor) else inputs:
        if x.shape[-1] != linear.in_features:
            raise RecipeError(
                f"inputs of width {x.shape[-1]} do not fit a layer of {linear.in_features} inputs: give [..., "
                f"{linear.in_features}]"
            )
        accumulator.add(x.detach())
    hessian = accumulator.value()
    if linear.input_index is not None:
        hessian = hessian[linear.input_index][:, linear.input_index]
    weight, gone = linear.dense_weight(torch.float64), linear.weight.shape[1] - columns
    if gone == 0:
        return linear
    raised, factor, _ = obs.damped(hessian, damping, "the layer")
    removal = obs.remove_adapting(weight, factor, 1, gone) if refit else obs.remove_fixed(weight, hessian, 1, gone)
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[removal.order] = False
    kept = stays.nonzero().flatten()
    pruned = keep_inputs(linear, kept)
    if refit:
        assert isinstance(pruned.weight, Tensor)
        pruned.weight = obs.refit(weight, raised, kept).to(pruned.weight.dtype)
    return pruned
