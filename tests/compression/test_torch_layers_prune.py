"""prune_linear: a drop-in that computes less, for any PyTorch model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halve.compression.torch_layers import prune_linear, quantize_linear
from halve.errors import RecipeError
from tests.common import relative

X = torch.randn(200, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = X @ torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(24, 16, bias=bias, dtype=torch.float64)


def test_equals_the_layer_with_the_channels_zeroed() -> None:
    full = layer()
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
    full = layer(bias)
    error = {
        name: relative(prune_linear(full, input_fraction=0.5, **options)(X), full(X))
        for name, options in {
            "l1": {},
            "fixed": {"inputs": X, "refit": False},
            "refit": {"inputs": [X[:100], X[100:].view(10, 10, 24)]},
        }.items()
    }
    assert error["refit"] < error["fixed"] < error["l1"]


def test_in_a_model_with_state_and_device() -> None:
    model = nn.Sequential(layer().float(), nn.ReLU(), nn.Linear(16, 4))
    model[0] = prune_linear(model[0], input_fraction=0.5)  # type: ignore[arg-type]
    y = model(X.float())
    again = nn.Sequential(prune_linear(layer(bias=True).float(), input_fraction=0.5), nn.ReLU(), nn.Linear(16, 4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X.float()), y)
    assert model.bfloat16()(X.bfloat16()).dtype == torch.bfloat16


def test_quantize_then_prune() -> None:
    quantized = quantize_linear(layer().float(), bits=8, group_size=8)
    pruned = prune_linear(quantized, input_fraction=0.25, output_fraction=0.25)
    kept = (pruned.linear(torch.float32).full_weight() != 0).float()
    assert int(kept.sum()) == 18 * 12
    expected = X.float() @ (quantized.linear(torch.float32).dense_weight() * kept).t() + quantized.bias
    assert relative(pruned(X.float()), expected) < 1e-6
    with pytest.raises(RecipeError, match="refit=False"):
        prune_linear(quantized, X.float(), input_fraction=0.25)
    assert prune_linear(quantized, X.float(), input_fraction=0.25, refit=False)(X.float()).shape == (200, 16)


def test_bad_input() -> None:
    with pytest.raises(RecipeError, match="input_fraction"):
        prune_linear(layer(), input_fraction=1.0)
    with pytest.raises(RecipeError, match="output_fraction"):
        prune_linear(layer(), output_fraction=-0.5)
    with pytest.raises(RecipeError, match="width 23"):
        prune_linear(layer(), X[:, :23], input_fraction=0.5)
