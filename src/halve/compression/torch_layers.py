"""Compressed layers for any PyTorch model: what replaces an `nn.Linear` where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.reader import check_device
from halve.checkpoint.stored import PARTS, SCALE, StoredLinear, check_dtype, to_parts
from halve.checkpoint.tensors import all_finite
from halve.compression.edits import (
    column_norms,
    keep_inputs,
    keep_outputs,
    kept_count,
    largest,
    row_norms,
)
from halve.compression.methods import obs
from halve.compression.methods.gptq import gptq
from halve.compression.recipe import make_step
from halve.compression.second_moment import second_moment
from halve.errors import RecipeError
from halve.model.inventory import LinearShape
from halve.model.linear import Linear
from halve.quantization import quantize


class DropIn(nn.Module):
    """A compressed layer with the interface of the `nn.Linear` it replaces: x [..., I] -> y [..., O].

    Its tensors are those that a file holds of it, as buffers, so they move with `.to(device)` and are in `state_dict()`;
    a change of the module's dtype leaves scales and codes alone, the computation follows the dtype of x.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        has_bias = linear.bias is not None
        self.stored = StoredLinear.of(
            linear, LinearShape("the layer", "", None, self.out_features, self.in_features, has_bias)
        )
        parts = to_parts(linear)
        for part in PARTS:
            self.register_buffer(part, parts[part].detach() if part in parts else None)
        self._built: dict[torch.dtype, Linear] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropIn:
        scale = self._buffers[SCALE]
        super()._apply(fn, recurse)
        moved = self._buffers[SCALE]
        if scale is not None and moved is not None and moved.dtype != scale.dtype:
            self._buffers[SCALE] = scale.to(moved.device)  # rounding it again would change every weight
        self._built.clear()
        return self

    def unprepared(self, dtype: torch.dtype) -> Linear:
        """The layer with dense weights and bias in `dtype`, no kernel chosen."""
        device = next(self.buffers()).device
        check_device(device)
        return self.stored.to_linear(self.get_buffer, dtype, device)

    def linear(self, dtype: torch.dtype) -> Linear:
        """The layer for inputs of `dtype`, its kernel chosen."""
        if dtype not in self._built:
            linear = self.unprepared(dtype)
            linear.select_backend("auto", dtype)
            self._built[dtype] = linear
        return self._built[dtype]

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """As torch does, which tells wrong shapes and missing tensors. Raises CheckpointError for tensors of another kind of
        dtype and for indices that do not fit, before anything is changed."""
        given = {part: state_dict[prefix + part] for part in PARTS if prefix + part in state_dict}
        for part, tensor in given.items():
            check_dtype(part, tensor.dtype, f"{prefix}{part}")
        self.stored.check_values(given, prefix and f"{prefix[:-1]}: ")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._built.clear()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.dtype)(x)

    @property
    def nbytes(self) -> int:
        """Bytes of everything the layer keeps."""
        return sum(t.nbytes for t in self._buffers.values() if t is not None)

    def extra_repr(self) -> str:
        spec = self.stored.spec
        kind = "" if spec is None else f", int{spec.bits}, group_size={spec.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{kind}"


@torch.inference_mode(False)
@torch.no_grad()
def quantize_linear(
    layer: nn.Linear,
    inputs: Tensor | Iterable[Tensor] | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
    scale: str = "mse",
) -> DropIn:
    """A quantized drop-in for `layer`, which is left as it is.

    inputs: what the layer reads in use, floating [..., I], or an iterable of such; the layer is then quantized by GPTQ
    (`halve.methods.gptq`). None: round to nearest. group_size -1 is one scale per output. Raises RecipeError for a layer that
    is no nn.Linear, options that a recipe would refuse, a group size that does not divide I or inputs of another width,
    DataError for inputs that are not finite.
    """
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    asked = _checked("quantize_linear", "gptq", **options, act_order=act_order, damping=damping, scale=scale)
    spec, weight = asked.spec(), _weight("quantize_linear", layer)
    check_device(weight.device)
    if inputs is None:
        quantized = quantize(weight, spec)
    else:
        hessian = _second_moment(inputs, layer.in_features, weight.device)
        how = {"damping": asked.damping, "act_order": asked.act_order, "scale": asked.scale}
        quantized, _ = gptq(weight, hessian, spec, **how, name="the layer")
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return DropIn(Linear(quantized, bias))


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
    loses codes and cannot be refitted. Fractions lie in [0, 1) and are rounded down to channels. Raises RecipeError
    for what is no nn.Linear, options that a recipe would refuse or inputs of another width.
    """
    input_fraction = _checked("prune_linear input_fraction", "l1-inputs", fraction=input_fraction).fraction
    output_fraction = _checked("prune_linear output_fraction", "l1-outputs", fraction=output_fraction).fraction
    asked = _checked("prune_linear", "prune-mlp", refit=refit, damping=damping)
    if isinstance(layer, DropIn):
        linear = layer.unprepared(layer.weight.dtype if isinstance(layer.weight, Tensor) else torch.float32)
    else:
        linear = Linear(_weight("prune_linear", layer), None if layer.bias is None else layer.bias.detach().clone())
    columns = kept_count(linear.weight.shape[1], input_fraction)
    if inputs is None:
        linear = keep_inputs(linear, largest(column_norms(linear), columns))
    else:
        linear = _keep_fitted(linear, inputs, columns, asked.refit, asked.damping)
    rows = kept_count(linear.weight.shape[0], output_fraction)
    return DropIn(keep_outputs(linear, largest(row_norms(linear), rows)))


def _checked(what: str, step: str, **options: Any) -> Any:
    """The options as a step of a recipe takes them."""
    try:
        return make_step(step, options)
    except RecipeError as error:
        raise RecipeError(f"{what}: {error}") from error


def _weight(function: str, layer: Any) -> Tensor:
    """The weight [O, I] of a layer that computes x W^T + b and nothing else. Raises RecipeError."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, DropIn):
        reason = "is compressed already: quantize first, then prune"
    elif not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        reason = (
            "does not compute x W^T + b with a weight [out, in] as an nn.Linear does: give it as one (a Conv1D with its "
            "weight transposed, an adapter merged)"
        )
    elif isinstance(layer.weight, nn.parameter.UninitializedParameter) or layer.weight.is_meta:
        reason = "has no weights yet: load or run the model first"
    elif not layer.weight.is_floating_point() or layer.weight.shape != (layer.out_features, layer.in_features):
        held = f"{layer.weight.dtype} {list(layer.weight.shape)}"
        reason = (
            f"holds its weight as {held}, not floating [{layer.out_features}, {layer.in_features}]: unpack it first"
        )
    elif not all_finite(layer.weight.detach()):
        reason = "holds NaN or infinite weights: nothing can be computed with it, get an intact copy"
    else:
        return layer.weight.detach()
    raise RecipeError(f"{function}: the layer is a {kind}, which {reason}")


def _keep_fitted(
    linear: Linear, inputs: Tensor | Iterable[Tensor], columns: int, refit: bool, damping: float
) -> Linear:
    if refit and not isinstance(linear.weight, Tensor):
        raise RecipeError("a quantized layer cannot be refitted: prune it before quantizing, or use refit=False")
    hessian = _second_moment(inputs, linear.in_features, linear.weight.device)
    if linear.input_index is not None:
        hessian = hessian[linear.input_index][:, linear.input_index]
    weight = linear.dense_weight(torch.float64)
    count = weight.shape[1] - columns
    if count == 0:
        return linear
    raised, factor, _ = obs.damped(hessian, damping, "the layer")
    removal = obs.remove_adapting(weight, factor, 1, count) if refit else obs.remove_fixed(weight, hessian, 1, count)
    kept = removal.kept(weight.shape[1])
    pruned = keep_inputs(linear, kept)
    if not refit:
        return pruned
    assert isinstance(pruned.weight, Tensor)
    return pruned.replaced(weight=obs.refit(weight, raised, kept).to(pruned.weight.dtype))


def _second_moment(inputs: Tensor | Iterable[Tensor], in_features: int, device: torch.device) -> Tensor:
    """That of the inputs given, float32 [I, I]. Raises RecipeError when they are of another width."""

    def fitting() -> Iterator[Tensor]:
        for x in [inputs] if isinstance(inputs, Tensor) or not isinstance(inputs, Iterable) else inputs:
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
                raise RecipeError(
                    f"inputs are floating tensors [..., {in_features}] or an iterable of such, not {_kind(x)}"
                )
            if x.shape[-1] != in_features:
                raise RecipeError(
                    f"inputs of width {x.shape[-1]} do not fit a layer of {in_features} inputs: give [..., "
                    f"{in_features}]"
                )
            check_device(x.device)
            yield x.detach()

    return second_moment(fitting(), in_features, device)


def _kind(value: Any) -> str:
    return f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
