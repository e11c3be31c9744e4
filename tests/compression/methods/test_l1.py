"""L1 width pruning: which channels go, and that nothing but them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halve import compress, load_model
from halve.checkpoint.reader import open_checkpoint
from halve.compression.recipe import parse_step
from halve.errors import RecipeError
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight
from tests.common import FAMILIES, TOKENS, full_weight, logits, relative


def blocks(folder: Path) -> list[dict[str, Linear]]:
    checkpoint = open_checkpoint(folder)
    return [dict(checkpoint.block(i, torch.float32).linears.items()) for i in range(len(checkpoint.config.layers))]  # type: ignore[arg-type]


def zeroed(
    folder: Path, keep: dict[tuple[int, str], tuple[torch.Tensor, int]], values: Path | None = None
) -> torch.Tensor:
    """Logits, by transformers, of the model at `folder` with the linears of the one at `values` (quantized, say), all
    but the named channels of each set to 0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    family, linears = open_checkpoint(folder).family, blocks(values or folder)
    with torch.no_grad():
        for (layer, role), (kept, dim) in keep.items():
            weight = model.get_parameter(family.block_name(layer, role) + ".weight")
            weight.copy_(full_weight(linears[layer][role]))
            gone = torch.ones(weight.shape[dim], dtype=torch.bool)
            gone[kept] = False
            weight[(slice(None),) * dim + (gone,)] = 0
    with torch.inference_mode():
        return model(TOKENS).logits


def lowest_gone(weight: torch.Tensor, dim: int, gone: int) -> torch.Tensor:
    norms = [float(w.abs().sum()) for w in weight.detach().unbind(dim)]
    order = sorted(range(len(norms)), key=lambda i: norms[i])
    return torch.tensor(sorted(order[gone:]))


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("step", ["l1-inputs", "l1-outputs"])
def test_equals_the_full_model_with_the_least_channels_zeroed(
    make_hf, tmp_path: Path, kind: str, options: dict, step: str
) -> None:
    source = make_hf(kind, **options)
    result = compress(source, tmp_path / "out", [f"{step}:fraction=0.3"])
    keep, dim = {}, 1 if step == "l1-inputs" else 0
    for layer, linears in enumerate(blocks(source)):
        for role, linear in linears.items():
            weight = linear.dense_weight()
            keep[layer, role] = lowest_gone(weight, dim, int(0.3 * weight.shape[dim])), dim
    assert relative(logits(tmp_path / "out"), zeroed(source, keep)) < 1e-5
    assert result.manifest["steps"][0]["linear_bytes_after"] < result.manifest["steps"][0]["linear_bytes_before"]


@pytest.mark.parametrize("first", ["rtn:bits=4,group_size=16", "rtn:bits=8", "rtn:bits=4,group_size=8,symmetric=false"])
@pytest.mark.parametrize("step", ["l1-inputs:fraction=0.35", "l1-outputs:fraction=0.35"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_on_quantized_layers_only_codes_go(make_hf, tmp_path: Path, kind: str, first: str, step: str) -> None:
    source = make_hf(kind)
    compress(source, tmp_path / "quantized", [first])
    compress(tmp_path / "quantized", tmp_path / "out", [step])
    keep, dim = {}, 1 if step.startswith("l1-inputs") else 0
    before, after = blocks(tmp_path / "quantized"), blocks(tmp_path / "out")
    for layer, linears in enumerate(before):
        for role, linear in linears.items():
            weight = linear.dense_weight()
            keep[layer, role] = lowest_gone(weight, dim, int(0.35 * weight.shape[dim])), dim
            old, new = linear.weight, after[layer][role].weight
            assert isinstance(old, QuantizedWeight) and isinstance(new, QuantizedWeight)
            assert new.packed.nbytes < old.packed.nbytes
    expected = zeroed(source, keep, tmp_path / "quantized")
    assert relative(logits(tmp_path / "out"), expected) < 1e-5


def test_down_proj_narrows_the_mlp_to_a_plain_model(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama", mlp_bias=True)
    compress(source, tmp_path / "out", ["l1-inputs:fraction=0.25,targets=down_proj"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == "llama" and theirs.config.intermediate_size == 36
    with torch.inference_mode():
        assert relative(logits(tmp_path / "out"), theirs(TOKENS).logits) < 1e-5
    keep = {
        (i, "down_proj"): (lowest_gone(block["down_proj"].dense_weight(), 1, 12), 1)
        for i, block in enumerate(blocks(source))
    }
    assert relative(logits(tmp_path / "out"), zeroed(source, keep)) < 1e-5


@pytest.mark.parametrize("first", [[], ["rtn:bits=4,group_size=16"]], ids=["dense", "quantized"])
def test_siblings_share_one_set_and_merge(make_hf, tmp_path: Path, first: list[str]) -> None:
    compress(make_hf("llama"), tmp_path / "out", [*first, "l1-inputs:fraction=0.5,shared=true"])
    for block in blocks(tmp_path / "out"):
        for roles in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            sets = {tuple(block[role].input_index.tolist()) for role in roles}  # type: ignore[union-attr]
            assert len(sets) == 1
            (kept,) = sets
            assert list(kept) == sorted(kept) and len(kept) == 16
    merged = dict(load_model(tmp_path / "out").linears())
    assert merged["layers.0.qkv_proj"].weight.shape == (64, 16)
    assert "layers.0.gate_up_proj" in merged


def test_shared_set_is_that_of_the_summed_norms(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama")
    compress(source, tmp_path / "out", ["l1-inputs:fraction=0.5,shared=true,targets=*q_proj|*k_proj|*v_proj"])
    before, after = blocks(source)[1], blocks(tmp_path / "out")[1]
    stacked = torch.cat([before[role].dense_weight() for role in ("q_proj", "k_proj", "v_proj")])
    assert after["k_proj"].input_index is not None
    assert torch.equal(after["k_proj"].input_index, lowest_gone(stacked, 1, 16))


def test_pruned_tied_head_leaves_the_embedding(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama", tie_word_embeddings=True)
    compress(source, tmp_path / "out", ["l1-inputs:fraction=0.25,targets=lm_head"])
    before, after = load_model(source), load_model(tmp_path / "out")
    assert torch.equal(before.table.dense_weight(), after.table.dense_weight())
    assert after.head.weight.shape == (97, 24) and after.head.input_index is not None
    x = torch.randn(4, 32)
    kept = torch.zeros(32)
    kept[after.head.input_index] = 1
    assert relative(after.head(x), (x * kept) @ before.table.dense_weight().t()) < 1e-6


def test_pruning_twice_and_in_both_directions_composes(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama")
    steps = ["l1-outputs:fraction=0.25", "l1-inputs:fraction=0.25", "l1-inputs:fraction=0.5", "rtn:bits=8"]
    compress(source, tmp_path / "out", steps)
    for before, after in zip(blocks(source), blocks(tmp_path / "out"), strict=True):
        for role, linear in after.items():
            assert linear.weight.shape[1] == before[role].in_features * 3 // 8, role
            assert linear.weight.shape[0] == before[role].out_features * 3 // 4, role
            kept = full_weight(linear) != 0
            full = torch.where(kept, before[role].dense_weight(), 0)
            # what is left is the old weight, up to 8-bit rounding
            assert float((full_weight(linear) - full).abs().max()) <= float(full.abs().max()) / 127
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_fraction_zero_changes_nothing(make_hf, tmp_path: Path) -> None:
    source = make_hf("opt")
    for step in ("l1-inputs:fraction=0", "l1-outputs:fraction=0"):
        compress(source, tmp_path / step[:9], [step])
        assert torch.equal(logits(tmp_path / step[:9]), logits(source))


@pytest.mark.parametrize("fraction", ["1", "-0.1", "1.5", "nan"])
@pytest.mark.parametrize("step", ["l1-inputs", "l1-outputs"])
def test_fractions_outside_the_range_are_refused(step: str, fraction: str) -> None:
    with pytest.raises(RecipeError, match="fraction="):
        parse_step(f"{step}:fraction={fraction}")


def test_shared_needs_whole_siblings(make_hf, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="among the targets"):
        compress(make_hf("llama"), tmp_path / "a", ["l1-inputs:shared=true,targets=*q_proj"])
    with pytest.raises(RecipeError, match="shared=false"):
        compress(make_hf("llama"), tmp_path / "b", ["l1-inputs", "l1-inputs:shared=true"])
