"""The drop-in layer: stands where an nn.Linear stood, in any model, and keeps what it keeps through save and move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve import prune_linear, quantize_linear
from halve.errors import CheckpointError, DataError, HalveError, RecipeError
from halve.quantization import QuantSpec, quantize
from tests.common import full_weight, relative


def layer(columns: int = 64, rows: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias)


def inputs(columns: int = 64, rows: int = 400) -> torch.Tensor:
    """Correlated channels of very different size, as in a transformer."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator) @ mix


@pytest.mark.parametrize("bias", [True, False])
def test_replaces_a_layer_inside_a_model(bias: bool) -> None:
    x = inputs()
    model = nn.Sequential(layer(bias=bias), nn.ReLU(), nn.Linear(48, 5))
    expected = model(x)
    model[0] = quantize_linear(model[0], x, bits=8, group_size=32)
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
    assert model(x.view(20, 20, 64)).shape == (20, 20, 5)


def test_inputs_halve_the_output_error_of_rounding() -> None:
    """Correlated inputs are where GPTQ pays: its output error must be clearly below round-to-nearest's."""
    original, x = layer(), inputs()
    exact = original(x)
    by_data, by_rounding = (quantize_linear(original, given, group_size=32)(x) for given in (x, None))
    assert (by_data - exact).norm() < 0.7 * (by_rounding - exact).norm()


def test_without_inputs_it_rounds_to_nearest() -> None:
    original = layer()
    made = quantize_linear(original, bits=4, group_size=16, symmetric=False)
    expected = quantize(original.weight.detach(), QuantSpec(4, 16, False)).dequantize()
    assert torch.equal(made(torch.eye(64)), expected.t() + original.bias)


def test_batches_are_the_same_as_one_tensor() -> None:
    x = inputs()
    whole, parts = quantize_linear(layer(), x, group_size=32), quantize_linear(layer(), x.split(128), group_size=32)
    # the sums are taken in another order, so a code on the edge may differ
    assert (whole.weight_packed == parts.weight_packed).float().mean() > 0.99


def test_bytes_are_those_of_four_bits() -> None:
    """64 x 48 codes of 4 bits, 2 float32 scales a row, 48 float32 biases, the shape as two int64."""
    assert quantize_linear(layer(), inputs(), group_size=32).nbytes == 64 * 48 // 2 + 48 * 2 * 4 + 48 * 4 + 16


def test_state_dict_restores_it_into_a_layer_of_the_same_scheme() -> None:
    x = inputs()
    made = quantize_linear(layer(), x, group_size=32)
    torch.manual_seed(5)
    other = quantize_linear(nn.Linear(64, 48), x, group_size=32)
    assert not torch.equal(other(x), made(x))
    assert set(made.state_dict()) == {"weight_packed", "weight_scale", "weight_shape", "bias"}  # as in a file
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))


def test_a_change_of_dtype_keeps_the_numbers() -> None:
    x = inputs()
    made = quantize_linear(layer(bias=False), x, group_size=32)
    expected = made(x)
    made.to(torch.bfloat16)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(made(x), expected)


def test_the_layer_given_is_left_alone() -> None:
    original = layer()
    before = original.weight.clone()
    quantize_linear(original, inputs(), group_size=32)
    assert torch.equal(original.weight, before) and original.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({"group_size": 48}, inputs(), RecipeError, r"group_size=48 does not divide 64 input columns.*64, 32, 16"),
        ({"bits": 5}, None, RecipeError, "bits=5"),
        ({"group_size": 32}, torch.ones(3, 63), RecipeError, "width 63 do not fit a layer of 64"),
        ({"group_size": 32}, torch.full((3, 64), torch.nan), DataError, "the layer: its Hessian holds inf or nan"),
        ({"group_size": 32}, [], DataError, "no calibration token"),
        ({"group_size": 32, "scale": "best"}, inputs(), RecipeError, "scale='best'"),
    ],
)
def test_what_cannot_work_says_why(options: dict, x: torch.Tensor | None, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_linear(layer(), x, **options)


# pruning

X = torch.randn(200, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = X @ torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small_layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(24, 16, bias=bias, dtype=torch.float64)


def test_pruned_equals_the_layer_with_the_channels_zeroed() -> None:
    full = small_layer()
    pruned = prune_linear(full, input_fraction=0.25, output_fraction=0.5)
    columns = sorted(range(24), key=lambda j: float(full.weight[:, j].detach().abs().sum()))[:6]
    zeroed = full.weight.detach().clone()
    zeroed[:, columns] = 0
    rows = sorted(range(16), key=lambda i: float(zeroed[i].abs().sum()))[:8]
    zeroed[rows] = 0
    assert relative(pruned(X), X @ zeroed.t() + full.bias) <= 1e-12
    assert pruned.weight is not None and pruned.weight.shape == (8, 18)
    assert full.weight.shape == (16, 24)


@pytest.mark.parametrize("bias", [True, False])
def test_refit_on_the_inputs_is_better_than_leaving_the_weights(bias: bool) -> None:
    full = small_layer(bias)
    error = {
        name: relative(prune_linear(full, input_fraction=0.5, **options)(X), full(X))
        for name, options in {
            "l1": {},
            "fixed": {"inputs": X, "refit": False},
            "refit": {"inputs": [X[:100], X[100:].view(10, 10, 24)]},
        }.items()
    }
    assert error["refit"] < error["fixed"] < error["l1"]


def test_pruned_in_a_model_with_state_and_device() -> None:
    model = nn.Sequential(small_layer().float(), nn.ReLU(), nn.Linear(16, 4))
    model[0] = prune_linear(model[0], input_fraction=0.5)  # type: ignore[arg-type]
    y = model(X.float())
    again = nn.Sequential(prune_linear(small_layer(bias=True).float(), input_fraction=0.5), nn.ReLU(), nn.Linear(16, 4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X.float()), y)
    assert model.bfloat16()(X.bfloat16()).dtype == torch.bfloat16


def test_quantize_then_prune() -> None:
    quantized = quantize_linear(small_layer().float(), bits=8, group_size=8)
    pruned = prune_linear(quantized, input_fraction=0.25, output_fraction=0.25)
    kept = (full_weight(pruned.linear(torch.float32)) != 0).float()
    assert int(kept.sum()) == 18 * 12
    expected = X.float() @ (quantized.linear(torch.float32).dense_weight() * kept).t() + quantized.bias
    assert relative(pruned(X.float()), expected) < 1e-6
    with pytest.raises(RecipeError, match="refit=False"):
        prune_linear(quantized, X.float(), input_fraction=0.25)
    assert prune_linear(quantized, X.float(), input_fraction=0.25, refit=False)(X.float()).shape == (200, 16)


class Adapted(nn.Module):
    """A layer with an adapter beside it, as adapters are: it has the weight, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features, self.bias = layer(), 64, 48, None

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Transposed(nn.Linear):
    """The class of an nn.Linear, its weight [in, out]."""

    def __init__(self) -> None:
        super().__init__(64, 48)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())


def spoilt() -> nn.Linear:
    made = layer()
    with torch.no_grad():
        made.weight[3, 4] = torch.nan
    return made


@pytest.mark.parametrize("function", [quantize_linear, prune_linear])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Conv1D(48, 64), r"Conv1D, which does not compute x W\^T"),
        (lambda: Conv1D(64, 64), r"Conv1D, which does not compute x W\^T"),  # as wide as high
        (lambda: nn.Embedding(48, 64), "Embedding, which does not compute"),
        (lambda: nn.Conv2d(8, 8, 3), "Conv2d, which does not compute"),
        (lambda: nn.Bilinear(8, 8, 8), "Bilinear, which does not compute"),
        (Adapted, "Adapted, which does not compute"),
        (Own, "which does not compute"),
        (lambda: nn.LazyLinear(48), "has no weights yet"),
        (lambda: nn.Linear(64, 48, device="meta"), "has no weights yet"),
        (Transposed, r"holds its weight as torch.float32 \[64, 48\], not floating \[48, 64\]"),
        (spoilt, "holds NaN or infinite weights"),
        (lambda: torch.ones(48, 64), "torch.Tensor, which does not compute"),
    ],
)
def test_what_is_no_linear_is_refused(function: Any, made: Any, words: str) -> None:
    given = Own(64, 48) if made is Own else made()
    for x in (None, inputs()):
        with pytest.raises(RecipeError, match=words):
            function(given, x)


def test_a_linear_of_another_name_is_one() -> None:
    class Named(nn.Linear):
        pass

    named = Named(64, 48)
    assert quantize_linear(named, bits=8, group_size=32)(inputs()).shape == (400, 48)
    parametrized = torch.nn.utils.parametrizations.weight_norm(layer())
    assert relative(prune_linear(parametrized)(inputs()), parametrized(inputs())) < 1e-6


def test_a_layer_is_quantized_once() -> None:
    with pytest.raises(RecipeError, match="is compressed already: quantize first, then prune"):
        quantize_linear(prune_linear(layer()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (quantize_linear, {"bits": 4.5}),
        (quantize_linear, {"bits": True}),
        (quantize_linear, {"bits": "four"}),
        (quantize_linear, {"group_size": 0}),
        (quantize_linear, {"group_size": -2}),
        (quantize_linear, {"group_size": 32.0}),
        (quantize_linear, {"symmetric": "perhaps"}),
        (quantize_linear, {"act_order": None}),
        (quantize_linear, {"damping": 2}),
        (quantize_linear, {"damping": -0.1}),
        (quantize_linear, {"damping": float("nan")}),
        (quantize_linear, {"scale": "best"}),
        (prune_linear, {"input_fraction": float("nan")}),
        (prune_linear, {"input_fraction": "half"}),
        (prune_linear, {"output_fraction": None}),
        (prune_linear, {"output_fraction": True}),
        (prune_linear, {"damping": 0}),
        (prune_linear, {"damping": 1.5}),
        (prune_linear, {"refit": 3}),
    ],
)
def test_options_are_refused_as_in_a_recipe_with_inputs_and_without(function: Any, options: dict[str, Any]) -> None:
    (name,) = options
    for x in (None, inputs()):
        with pytest.raises(RecipeError, match=rf"^{function.__name__}.*{name.split('_')[-1]}="):
            function(layer(), x, **options)


@pytest.mark.parametrize("x", [torch.ones(3, 64, dtype=torch.int64), torch.tensor(1.0), [[1.0] * 64], ["text"], 5])
def test_inputs_are_floating_tensors(x: Any) -> None:
    with pytest.raises(RecipeError, match=r"inputs are floating tensors \[..., 64\]"):
        prune_linear(layer(), x, input_fraction=0.5)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("group_index", lambda t: t + 1, r"points to 3, outside of 0 to 2"),
        ("group_index", torch.Tensor.float, "torch.float32, it must be torch.int32"),
        ("kept_inputs", lambda t: t * 1000, "points to .*, outside of 0 to 23"),
        ("kept_inputs", lambda t: t.flip(0), "is not ascending"),
        ("kept_outputs", lambda t: t - 16, "points to -"),
        ("kept_outputs", torch.zeros_like, "is not ascending, it names 0 and then 0"),
        ("weight_shape", lambda t: t + 1, r"is \[13, 19\], the weight is \[12, 18\]"),
        ("weight_packed", torch.Tensor.float, "torch.float32, it must be torch.int32"),
        ("weight_scale", torch.Tensor.int, "torch.int32, it must be floating"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    part: str, change, message: str, assign: bool
) -> None:
    quantized = quantize_linear(small_layer().float(), bits=8, group_size=8)
    model = nn.Sequential(prune_linear(quantized, input_fraction=0.25, output_fraction=0.25))
    y = model(X.float())
    state = dict(model.state_dict())
    state[f"0.{part}"] = change(state[f"0.{part}"])
    with pytest.raises(CheckpointError, match=rf"0.*{part}'? {message}" if "must" not in message else message):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model(X.float()), y)


def test_an_index_spoilt_in_place_is_refused() -> None:
    pruned = prune_linear(small_layer().float(), input_fraction=0.25)
    pruned.kept_inputs[-1] = 24  # type: ignore[index]
    with pytest.raises(CheckpointError, match="kept_inputs' points to 24, outside of 0 to 23"):
        pruned(X.float())


def test_pruning_that_cannot_work_says_why() -> None:
    with pytest.raises(RecipeError, match="input_fraction"):
        prune_linear(small_layer(), input_fraction=1.0)
    with pytest.raises(RecipeError, match="output_fraction"):
        prune_linear(small_layer(), output_fraction=-0.5)
    with pytest.raises(RecipeError, match="width 23"):
        prune_linear(small_layer(), X[:, :23], input_fraction=0.5)


def test_weights_and_inputs_of_a_device_without_numbers_are_refused() -> None:
    there, nowhere = nn.Linear(8, 4), nn.Linear(8, 4, device="meta")
    for use in (
        lambda: quantize_linear(nowhere, bits=8, group_size=-1),
        lambda: prune_linear(nowhere, input_fraction=0.5),
        lambda: prune_linear(quantize_linear(there, bits=8, group_size=-1).to("meta"), input_fraction=0.5),
        lambda: quantize_linear(there, torch.ones(3, 8, device="meta"), bits=8, group_size=-1),
    ):
        with pytest.raises(HalveError, match=r"device 'meta' .*: use cpu or cuda|has no weights yet"):
            use()
