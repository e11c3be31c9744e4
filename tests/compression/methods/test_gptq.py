"""GPTQ: hand cases, the invariants that any correct implementation keeps, what it refuses, and the step on real models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from halve import compress, load_model
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.checkpoint.writer import CheckpointWriter
from halve.compression import second_moment
from halve.compression import walk as calibrate
from halve.compression.methods import gptq as module
from halve.compression.methods.gptq import Gptq, gptq, quadratic
from halve.compression.plan import state_of
from halve.compression.walk import BlockView, Walk
from halve.compression.windows import Calibration, CalibrationOptions, make_windows
from halve.errors import DataError, RecipeError
from halve.quantization import QuantizedWeight, QuantSpec, quantize
from halve.texts import read_documents
from tests.common import FAMILIES

ALL_SPECS = [QuantSpec(b, g, s) for b in (2, 3, 4, 8) for g in (16, -1) for s in (True, False)]
SPEC_IDS = [f"{s.bits}bit-g{s.group_size}-{'sym' if s.symmetric else 'asym'}" for s in ALL_SPECS]


def correlated(columns: int = 64, rows: int = 500, seed: int = 0) -> torch.Tensor:
    """Inputs as a transformer has them: correlated, channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator) @ mix


def weights(rows: int = 24, columns: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return second_moment.second_moment([x], x.shape[1])


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, x: torch.Tensor) -> float:
    return float((x.double() @ (weight - quantized.dequantize()).double().t()).square().sum())


# hand cases


def test_hessian_by_hand() -> None:
    """2/N X^T X of [1, 2] and [3, 4]: [[10, 14], [14, 20]]."""
    assert hessian_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[10.0, 14.0], [14.0, 20.0]]


def test_hessian_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment, "_TILE", 24)  # 64 columns: two whole tiles and a part of one
    x = correlated()
    batches = [*x[:480].view(4, 3, 40, 64), x[480:].to(torch.float64)]
    expected = (2 / 500 * x.double().t() @ x.double()).float()
    torch.testing.assert_close(second_moment.second_moment(batches, 64), expected, rtol=1e-5, atol=1e-5)


def test_two_columns_by_hand() -> None:
    """Steps of 1, and two inputs that mostly agree: H = [[1, 0.9], [0.9, 1]], the first a trace more important.

    0.45 rounds to 0; the 0.45 it lost is worth 0.45 * 0.9 / 1 = 0.405 of the second input, whose 2.2 becomes 2.605 and
    rounds to 3, where plain rounding gives 2.
    """
    hessian = torch.tensor([[1.001, 0.9], [0.9, 1.0]])
    hessian = torch.block_diag(hessian, torch.tensor([[0.5]]))
    # the third column sets the scale to 1 and is coupled to nothing; the second row shows that rows do not mix
    weight = torch.tensor([[0.45, 2.2, 7.5], [7.5, 7.5, 0.0]])
    quantized, _ = gptq(weight, hessian, QuantSpec(4, -1), damping=0.0, scale="minmax")
    assert quantized.scale.tolist() == [[1.0], [1.0]]
    assert quantized.codes()[0].tolist() == [0, 3, 7]
    assert quantize(weight, QuantSpec(4, -1)).codes()[0].tolist() == [0, 2, 7]


def test_quadratic_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """w = [1, 2, 3], H = [[2, 1, 0], [1, 3, 0], [0, 0, 1]]: 2 + 2 * 2 + 12 + 9 = 27, in tiles of two columns too."""
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    for tile in (256, 2):
        monkeypatch.setattr(second_moment, "_TILE", tile)
        assert quadratic(torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), hessian).tolist() == [27.0, 3.0]


# invariants


@pytest.mark.parametrize("spec", ALL_SPECS, ids=SPEC_IDS)
@pytest.mark.parametrize("act_order", [True, False])
def test_uncorrelated_inputs_give_round_to_nearest(spec: QuantSpec, act_order: bool) -> None:
    """Nothing to absorb an error: with H = I, or any diagonal H, every bit is that of round-to-nearest."""
    weight = weights()
    for hessian in (torch.eye(64), torch.linspace(0.1, 9, 64).diag()):
        made, info = gptq(weight, hessian, spec, act_order=act_order, scale="minmax")
        plain = quantize(weight, spec)
        assert torch.equal(made.packed, plain.packed) and torch.equal(made.scale, plain.scale)
        assert (made.zero is None and plain.zero is None) or torch.equal(made.zero, plain.zero)
        assert info.dead_columns == 0


@pytest.mark.parametrize("spec", ALL_SPECS, ids=SPEC_IDS)
@pytest.mark.parametrize("scale", ["minmax", "mse"])
def test_output_error_is_below_rounding(spec: QuantSpec, scale: str) -> None:
    weight, x = weights(), correlated()
    made, info = gptq(weight, hessian_of(x), spec, scale=scale)
    error, plain = output_error(weight, made, x), output_error(weight, quantize(weight, spec), x)
    assert error < 0.8 * plain
    codes = made.codes()
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    assert made.group_index is None  # activation order leaves nothing to look up at run time
    # what is reported is what was done: 2/N ||X E^T||^2, and its share of the output
    assert float(info.loss.sum()) == pytest.approx(2 / 500 * error, rel=1e-3)
    output = float((x.double() @ weight.double().t()).square().sum())
    assert info.relative_error() == pytest.approx((error / output) ** 0.5, rel=1e-3)


def test_eight_bits_are_nearly_exact() -> None:
    weight, x = weights(), correlated()
    _, info = gptq(weight, hessian_of(x), QuantSpec(8, 16))
    assert info.relative_error() < 0.005


def test_equals_the_inverse_form_of_the_paper() -> None:
    """Algorithm 1 of arXiv 2210.17323 in float64, written with the Cholesky factor of the inverse Hessian."""
    weight, spec = weights().double(), QuantSpec(4, 16)
    hessian = hessian_of(correlated()).double()
    made, _ = gptq(weight.float(), hessian.float(), spec, scale="minmax")
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, codes = weight[:, order].clone(), torch.zeros(24, 64)
    for column in range(64):
        scale = made.scale[:, order[column] // 16].double()
        code = (left[:, column] / scale).round().clamp(-8, 7)
        codes[:, order[column]] = code.float()
        error = (left[:, column] - code * scale) / upper[column, column]
        left[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    assert (codes == made.codes()).float().mean() > 0.999  # float32 may turn a tie the other way


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings are stacked and long weights are cut: neither may show."""
    weight, hessian, spec = weights(), hessian_of(correlated()), QuantSpec(4, 16)
    whole, _ = gptq(weight, hessian, spec)
    top, bottom = gptq(weight[:10], hessian, spec)[0], gptq(weight[10:], hessian, spec)[0]
    assert (torch.cat((top.codes(), bottom.codes())) == whole.codes()).float().mean() > 0.999
    monkeypatch.setattr(module, "_ROWS", 7)
    cut, info = gptq(weight, hessian, spec)
    assert (cut.codes() == whole.codes()).float().mean() > 0.999 and info.loss.shape == (24,)


def test_same_input_same_bits() -> None:
    first, second = (gptq(weights(), hessian_of(correlated()), QuantSpec(3, 16, False))[0] for _ in range(2))
    assert torch.equal(first.packed, second.packed) and torch.equal(first.scale, second.scale)


def test_searched_ranges_never_miss_more_than_the_full_range() -> None:
    """By its own measure: squared error of the nearest codes, columns weighted by the diagonal."""
    weight, importance = weights() ** 3, torch.linspace(0.1, 5, 64)
    for spec in (QuantSpec(4, 16), QuantSpec(3, -1, symmetric=False)):
        missed = {}
        for how in module.SCALES:
            scale, zero = module.group_scales(weight, spec, torch.float32, importance, how)
            columns = spec.columns_per_group(64)
            wide = scale.repeat_interleave(columns, 1)
            wide_zero = None if zero is None else zero.repeat_interleave(columns, 1)
            nearest = module.decode(module.encode(weight, wide, wide_zero, spec), wide, wide_zero)
            missed[how] = (((weight - nearest) ** 2) * importance).view(24, -1, columns).sum(-1)
        assert (missed["mse"] <= missed["minmax"] * (1 + 1e-6)).all()
        assert missed["mse"].sum() < 0.9 * missed["minmax"].sum()


def test_scales_are_those_stored() -> None:
    """bfloat16 scales are rounded before codes are chosen, so the codes make up for the rounding."""
    weight, x = weights(), correlated()
    made, info = gptq(weight, hessian_of(x), QuantSpec(4, 16), scale_dtype=torch.bfloat16)
    assert made.scale.dtype == torch.bfloat16
    assert float(info.loss.sum()) == pytest.approx(2 / 500 * output_error(weight, made, x), rel=1e-3)


# hard inputs


def test_dead_inputs_are_rounded_to_nearest() -> None:
    """Inputs that are always 0 say nothing: their columns are kept as well as rounding can, the others as without them."""
    x, weight, spec = correlated(), weights(), QuantSpec(4, 16)
    x[:, [3, 40]] = 0
    made, info = gptq(weight, hessian_of(x), spec, scale="minmax")
    assert info.dead_columns == 2
    plain = quantize(weight, spec)
    assert torch.equal(made.codes()[:, [3, 40]], plain.codes()[:, [3, 40]])
    assert output_error(weight, made, x) < output_error(weight, plain, x)
    assert float(info.loss.sum()) == pytest.approx(2 / 500 * output_error(weight, made, x), rel=1e-3)


def test_inputs_that_are_all_zero_give_round_to_nearest() -> None:
    made, info = gptq(weights(), torch.zeros(64, 64), QuantSpec(4, 16), scale="minmax")
    assert torch.equal(made.packed, quantize(weights(), QuantSpec(4, 16)).packed)
    assert info.relative_error() == 0.0


def test_damping_grows_until_the_hessian_factors(caplog: pytest.LogCaptureFixture) -> None:
    """A slightly indefinite matrix, as rounding leaves it: every growth is logged with the layer's name."""
    vectors = torch.linalg.qr(weights(64, 64))[0]
    values = torch.ones(64)
    values[0] = -0.05
    hessian = (vectors * values) @ vectors.t()
    hessian = (hessian + hessian.t()) / 2
    with caplog.at_level(logging.WARNING):
        made, info = gptq(weights(), hessian, QuantSpec(4, 16), damping=0.001, name="layer 7 q_proj")
    assert info.damping == pytest.approx(0.1)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["layer 7 q_proj"] * 2
    assert torch.isfinite(made.dequantize()).all()


def test_fewer_tokens_than_inputs_still_work() -> None:
    """H of rank 5 out of 64 needs the damping, which is enough."""
    x, weight = correlated(rows=5), weights()
    made, info = gptq(weight, hessian_of(x), QuantSpec(4, 16))
    assert info.damping == 0.01
    assert output_error(weight, made, x) < output_error(weight, quantize(weight, QuantSpec(4, 16)), x)


def test_a_hessian_that_only_float64_can_factor_needs_no_damping(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks of integers that float32 holds exactly, with determinant 1 and an eigenvalue so near 0 that float32 rounding
    loses its sign; that it is kept in all eight by chance is as good as impossible."""
    generator, eye, blocks = torch.Generator().manual_seed(0), torch.eye(8, dtype=torch.float64), []
    for _ in range(8):
        drawn = torch.randint(-3, 4, (2, 8, 8), generator=generator).double()
        root = (drawn[0].triu(1) + eye) @ (drawn[1].tril(-1) + eye)
        blocks.append(root @ root.t())
    exact = torch.block_diag(*blocks)
    hessian = exact.float()
    assert torch.equal(hessian.double(), exact) and torch.linalg.cholesky_ex(hessian)[1] > 0
    with caplog.at_level(logging.WARNING):
        made, info = gptq(weights(), hessian, QuantSpec(4, -1), damping=0.0, act_order=False)
    assert info.damping == 0.0 and not caplog.records
    assert torch.isfinite(made.dequantize()).all()


def test_zero_damping_starts_small_when_it_must_grow() -> None:
    _, info = gptq(weights(), hessian_of(correlated(rows=5)), QuantSpec(4, 16), damping=0.0)
    assert 0 < info.damping <= 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_by_name(value: float) -> None:
    x = correlated()
    x[7, 5] = value
    with pytest.raises(DataError, match=r"layers\.3\.mlp: its Hessian holds inf or nan"):
        gptq(weights(), hessian_of(x), QuantSpec(4, 16), name="layers.3.mlp")
    weight = weights()
    weight[0, 0] = value
    with pytest.raises(DataError, match="its weight holds inf or nan"):
        gptq(weight, hessian_of(correlated()), QuantSpec(4, 16))


def test_a_hopeless_hessian_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"layer 3: Hessian is not positive definite even at damping 1"):
        gptq(weights(), -10 * torch.eye(64) + 11 * torch.eye(64).flip(0), QuantSpec(4, 16), name="layer 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 48},
            r"group_size=48 does not divide 64 input columns: use -1 \(per channel\) or one of \[64, 32",
        ),
        ({"damping": -0.1}, "damping=-0.1 must lie between 0 and 1"),
        ({"damping": 2.0}, "damping=2 must lie"),
        ({"scale": "best"}, "scale='best' is unknown: use minmax or mse"),
    ],
)
def test_options_that_cannot_work_say_why(options: dict, message: str) -> None:
    spec = QuantSpec(4, options.pop("group_size", 16))
    with pytest.raises(RecipeError, match=message):
        gptq(weights(), torch.eye(64), spec, **options)


def test_a_hessian_of_another_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a Hessian \(32, 32\) does not fit a weight \(24, 64\)"):
        gptq(weights(), torch.eye(32), QuantSpec(4, 16))


# the step


def walk_of(folder: Path) -> Walk:
    """Six calibration windows of random tokens and two held out, entering a small model in float32."""
    drawn = torch.randint(0, 97, (8, 40), generator=torch.Generator().manual_seed(0))
    return Walk(open_checkpoint(folder), Calibration(drawn[:6], drawn[6:], {}), torch.float32, "cpu")


def quantize_blocks(folder: Path, method: Gptq) -> tuple[Walk, list[BlockView], list[dict]]:
    """The step on every block, without writing anything: states after the last block, views, report rows."""
    walk = walk_of(folder)
    plan = method.plan(state_of(walk.checkpoint, torch.float32))
    views, rows = [], []
    with torch.inference_mode():
        for index in range(len(walk.checkpoint.config.layers)):
            view = walk.block(index)
            rows += method.edit(view, plan)
            assert view.block is not None
            walk.advance(view.block)
            views.append(view)
    return walk, views, rows


METHOD = Gptq(bits=4, group_size=16)


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_every_family_is_sequential_and_reports_what_it_did(make_hf, kind: str, options: dict) -> None:
    """Errors are recomputed from the definition: the inputs of each linear in the finished, quantized, block."""
    folder = make_hf(kind, **options)
    walk, views, rows = quantize_blocks(folder, METHOD)
    reported = {row["name"]: row for row in rows}
    check = walk_of(folder)
    for view in views:
        original = check.checkpoint.block(view.index or 0, torch.float32)
        seen: dict[str, list[torch.Tensor]] = {role: [] for role in view.linears}
        assert view.block is not None
        handles = [
            linear.register_forward_pre_hook(lambda _, x, role=role, seen=seen: seen[role].append(x[0].flatten(0, -2)))
            for role, linear in view.block.linears.items()
        ]
        check.advance(view.block)
        for handle in handles:
            handle.remove()
        for role, linear in view.linears.items():
            inputs = torch.cat(seen[role]).double().split(6 * 40)  # the calibration windows go first
            assert isinstance(linear.weight, QuantizedWeight)
            dense, row = original.linears[role].weight.double(), reported[view.name(role)]
            for x, key in zip(inputs, ("output_error", "held_out_output_error"), strict=True):
                wrong = x @ (linear.dense_weight().double() - dense).t()
                assert row[key] == pytest.approx(float(wrong.norm() / (x @ dense.t()).norm()), rel=2e-3)
            assert row["damping"] == 0.01 and row["dead_inputs"] == int((inputs[0] == 0).all(0).sum())
    assert len(reported) == sum(len(view.linears) for view in views)
    # one pass, halted at the stages, ends where a plain pass through the finished blocks does
    for halted, plain in zip(walk.states[0] + walk.states[1], check.states[0] + check.states[1], strict=True):
        torch.testing.assert_close(halted, plain, rtol=1e-5, atol=1e-5)


def test_windows_sent_anew_change_nothing(make_hf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_hf("llama")
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 80)
    _, held, _ = quantize_blocks(folder, METHOD)
    for limit in (0, 20_000):  # nothing is held; the first of three batches is
        monkeypatch.setattr(calibrate, "WAITING_BYTES", limit)
        _, anew, _ = quantize_blocks(folder, METHOD)
        for one, other in zip(held, anew, strict=True):
            for role, linear in one.linears.items():
                assert torch.equal(linear.weight.packed, other.linears[role].weight.packed)


def test_only_targets_change(make_hf) -> None:
    _, views, rows = quantize_blocks(make_hf("llama"), Gptq(group_size=16, targets=("down_proj", "k_proj")))
    assert {row["name"].rsplit(".", 1)[1] for row in rows} == {"down_proj", "k_proj"}
    assert [role for role, linear in views[0].linears.items() if linear.quantized] == ["k_proj", "down_proj"]


def test_a_group_that_does_not_divide(make_hf) -> None:
    """48 MLP inputs of down_proj in groups of 32: refused by name with sizes that fit, or per channel where asked."""
    folder = make_hf("llama")
    with pytest.raises(RecipeError, match=r"does not divide the 48 inputs of .*down_proj.*\(48, 24, 16"):
        Gptq(group_size=32).plan(state_of(open_checkpoint(folder), torch.float32))
    _, views, _ = quantize_blocks(folder, Gptq(group_size=32, fallback="channel"))
    sizes = {role: linear.weight.spec.group_size for role, linear in views[0].linears.items()}
    assert sizes.pop("down_proj") == -1 and set(sizes.values()) == {32}


def test_siblings_fall_back_together(make_hf) -> None:
    """The 24 inputs left to k_proj do not divide by 16: q and v, which read the same, are per channel with it."""
    folder = make_hf("llama")
    state = state_of(open_checkpoint(folder), torch.float32)
    linears = {k: s.keeping(inputs=24) if k == (0, "k_proj") else s for k, s in state.linears.items()}
    plan = Gptq(group_size=16, fallback="channel").plan(replace(state, linears=linears))
    fallen = {row.name.split("layers.")[1] for row in plan.rows if "fallback" in row.action}
    assert fallen == {f"0.self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"scale": "best"}, {"fallback": "no"}, {"bits": 6}])
def test_bad_options_are_refused_when_the_recipe_is_read(options: dict) -> None:
    with pytest.raises(RecipeError):
        Gptq(**options)


# real models

MODELS = ["stories260K", "babyllama-tok361"]
STEP = "gptq:bits=4,group_size=32,fallback=channel"


@pytest.mark.parametrize("name", MODELS)
def test_every_real_layer_errs_less_than_rounding(assets: Path, name: str) -> None:
    """At identical inputs, those of the dense model, the total output error of each linear is below round-to-nearest's."""
    folder = assets / "models" / name
    documents = read_documents(assets / "data" / "tinystories_317.txt")
    windows = make_windows(documents, load_tokenizer(folder), CalibrationOptions("stories", 8, 128), 512)
    walk = Walk(open_checkpoint(folder), windows, torch.float32, "cpu")
    for index in range(5):
        view = walk.block(index)
        for stage in view.stages():
            x = torch.cat(list(stage.inputs(False)))
            spec = QuantSpec(4, 32 if x.shape[1] % 32 == 0 else -1)
            for role in stage.roles:
                weight = view.linears[role].dense_weight()
                for scale, share in (("minmax", 1.0), ("mse", 0.9)):
                    made, _ = gptq(weight, hessian_of(x), spec, scale=scale)
                    assert output_error(weight, made, x) < share * output_error(weight, quantize(weight, spec), x)
        assert view.block is not None
        walk.advance(view.block)


def test_a_real_model_end_to_end(assets: Path, tmp_path: Path) -> None:
    """Reloaded by transformers with our logits, mixed schemes included; equal runs give equal bytes; all of it reported."""
    text = assets / "data" / "tinystories_317.txt"
    for out in ("a", "b"):
        compress(assets / "models" / MODELS[0], tmp_path / out, [STEP], calibration=text, samples=8, window=128)
    for file in (*sorted((tmp_path / "a").glob("*.safetensors")), tmp_path / "a" / "halve.json"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "halve.json").read_text())
    used = manifest["calibration"]
    assert (used["windows"], used["tokens"], used["held_out_tokens"]) == (8, 8 * 128, 128)
    assert used["source"] == text.name and 0 < used["documents_used"] < used["documents_available"] == 317
    layers = manifest["steps"][0]["linears"]
    touched = [row for row in layers if "output_error" in row]
    assert len(touched) == 35 and all(row["bytes_after"] < 0.2 * row["bytes_before"] for row in touched)
    assert all(row["damping"] == 0.01 for row in touched)
    assert all(0 < row["output_error"] < 0.2 and 0 < row["held_out_output_error"] < 0.2 for row in touched)
    assert {row["action"] for row in touched} == {"int4 g32", "int4 per channel (fallback)"}
    assert not any("seconds" in row for row in layers)  # equal runs are equal: times are in the log
    log = [json.loads(line) for line in (tmp_path / "a" / "halve-log.jsonl").read_text().splitlines()]
    assert [line["linear"] for line in log if "linear" in line] == [row["name"] for row in touched]
    assert all(line["seconds"] >= 0 for line in log) and log[-1]["step"] == "gptq"
    tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = load_model(tmp_path / "a")(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(tokens).logits
        dense = load_model(assets / "models" / MODELS[0])(tokens)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert 1e-3 < (ours - dense).norm() / dense.norm() < 0.2


def test_an_interrupted_calibration_goes_on(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the third of five blocks is written: the states are taken through the finished two, same bytes."""
    write, written = CheckpointWriter.write, []

    def interrupted(self: CheckpointWriter, part: int, *rest: Any) -> None:
        if part == 2 and 2 not in written:
            written.append(part)
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *rest)

    text, source = assets / "data" / "tinystories_317.txt", assets / "models" / MODELS[0]
    compress(source, tmp_path / "whole", [STEP], calibration=text, samples=8, window=128)
    monkeypatch.setattr(CheckpointWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", [STEP], calibration=text, samples=8, window=128)
    compress(source, tmp_path / "out", [STEP], calibration=text, samples=8, window=128)
    assert written == [0, 1, 2, 2, 3, 4, 5]
    for file in (*sorted((tmp_path / "whole").glob("*.safetensors")), tmp_path / "whole" / "halve.json"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    log = (tmp_path / "out" / "halve-log.jsonl").read_text()
    assert log.count('"linear"') == 35  # the times of the first blocks are those of the first run


def test_the_head_of_a_tied_model(assets: Path, tmp_path: Path) -> None:
    """Asked for by name and by itself, it is calibrated on the states after the final norm; the embedding stays as it was."""
    text, source = assets / "data" / "tinystories_317.txt", assets / "models" / MODELS[0]
    step = "gptq:bits=4,group_size=32,targets=lm_head,untie=true"
    result = compress(source, tmp_path / "out", [step], calibration=text, samples=8, window=128)
    (row,) = [row for row in result.manifest["steps"][0]["linears"] if "output_error" in row]
    assert row["name"] == "lm_head" and 0 < row["output_error"] < 0.1
    name = "model.embed_tokens.weight"
    assert torch.equal(open_checkpoint(source).tensor(name), open_checkpoint(tmp_path / "out").tensor(name))


# beyond the layer: target, refit, polish


@pytest.fixture
def few_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 128 drawn tokens count as enough for 48 channels."""
    monkeypatch.setattr("halve.compression.methods.problem.TOKENS_PER_CHANNEL", 1)


@pytest.fixture
def fed(drawn_windows: None, few_tokens_do: None) -> None:
    """Drawn windows, and all linears fitted to them."""


ALL = "target=dense,refit=true,polish=2"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_without_them_it_is_plain_gptq(make_hf, tmp_path: Path, drawn_windows: None) -> None:
    """Stage by stage, rows of siblings stacked, each on the inputs left by what was quantized before it: no bit differs from
    the functions used one after the other, which is what the step was before it knew of anything else."""
    folder = make_hf("qwen2")
    compress(folder, tmp_path / "out", ["gptq:group_size=16,target=layer,refit=false,polish=0"], calibration="drawn")
    drawn = torch.randint(0, 97, (5, 32), generator=torch.Generator().manual_seed(1))
    walk = Walk(open_checkpoint(folder), Calibration(drawn[:4], drawn[4:], {}), torch.float32, "cpu")
    made = open_checkpoint(tmp_path / "out")
    for index in range(3):
        view = walk.block(index)
        with torch.inference_mode():
            for stage in view.stages():
                weights = [view.linears[role].dense_weight() for role in stage.roles]
                hessian = second_moment.second_moment(stage.inputs(False), weights[0].shape[1])
                quantized, _ = gptq(torch.cat(weights), hessian, QuantSpec(4, 16))
                rows = torch.arange(quantized.out_features).split([weight.shape[0] for weight in weights])
                for role, part in zip(stage.roles, rows, strict=True):
                    name, here = view.name(role), quantized.rows(part)
                    assert torch.equal(made.tensor(f"{name}.weight_packed"), here.packed)
                    assert torch.equal(made.tensor(f"{name}.weight_scale"), here.scale)
                    view.replace_weight(role, here)
        assert view.block is not None
        walk.advance(view.block)


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_every_family_can_aim_at_the_dense_stream(
    make_hf, tmp_path: Path, fed: None, kind: str, options: dict, symmetric: str
) -> None:
    step = f"gptq:bits=3,group_size=16,symmetric={symmetric},{ALL}"
    result = compress(make_hf(kind, **options), tmp_path / "out", [step], calibration="drawn")
    assert torch.isfinite(load_model(tmp_path / "out")(drawn_tokens())).all()
    rows = [row for row in result.manifest["steps"][0]["linears"] if row["action"] != "skipped"]
    for row in rows:
        errors = row["held_out_output_errors"]
        assert row["accepted"] == min(errors, key=lambda which: errors[which])  # the first of equals
        assert row["held_out_output_error"] == min(errors.values()) and row["alpha"] in (0.0, 0.25, 0.5)
    first = [row for row in rows if ".0." in row["name"] and "q_proj" in row["name"]]
    assert first[0]["alpha"] == 0.0  # nothing has changed the stream yet


def drawn_tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(5))


def test_pruned_and_partly_read_linears_can_aim(make_hf, tmp_path: Path, fed: None) -> None:
    """Linears that keep some inputs and outputs, layers narrower than the stream knows of, a head of its own."""
    steps = [
        "prune-mlp:fraction=0.33,multiple_of=16",
        "l1-inputs:fraction=0.5,targets=q_proj",
        "l1-outputs:fraction=0.2",
    ]
    steps.append(f"gptq:bits=4,group_size=-1,{ALL},targets=Linear|lm_head")
    compress(make_hf("llama"), tmp_path / "out", steps, calibration="drawn")
    assert torch.isfinite(load_model(tmp_path / "out")(drawn_tokens())).all()


@pytest.mark.parametrize("crash_at", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bytes(
    make_hf, tmp_path: Path, fed: None, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """The dense stream is brought to where the run goes on."""
    source, steps = make_hf("gemma2", head_dim=16), [f"gptq:bits=4,group_size=16,{ALL}"]
    compress(source, tmp_path / "whole", steps, calibration="drawn")
    original, writes = CheckpointWriter.write, 0

    def crashing(self: CheckpointWriter, part: int, tensors: Any, rows: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == crash_at + 1:
            raise KeyboardInterrupt
        original(self, part, tensors, rows)

    monkeypatch.setattr(CheckpointWriter, "write", crashing)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", steps, calibration="drawn")
    monkeypatch.setattr(CheckpointWriter, "write", original)
    compress(source, tmp_path / "out", steps, calibration="drawn")
    assert shards(tmp_path / "whole") == shards(tmp_path / "out")
    assert (tmp_path / "whole" / "halve.json").read_bytes() == (tmp_path / "out" / "halve.json").read_bytes()


def test_linears_with_few_tokens_are_left_to_plain_gptq(make_hf, tmp_path: Path, drawn_windows: None) -> None:
    """128 tokens are 4 for each of 32 inputs, and fewer for each of the 48 of down_proj."""
    result = compress(make_hf("llama"), tmp_path / "out", [f"gptq:group_size=16,{ALL}"], calibration="drawn")
    for row in result.manifest["steps"][0]["linears"]:
        if row["action"] != "skipped":
            assert ("accepted" in row) == ("down_proj" not in row["name"])
            assert "down_proj" not in row["name"] or row["alpha"] == 0.0


@torch.inference_mode()
def divergence(folder: Path, dense: Path, tokens: torch.Tensor) -> float:
    p, q = (load_model(each)(tokens).log_softmax(-1) for each in (dense, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "tokens", "samples", "share"),
    [(m, 200, 24, 0.85) for m in MODELS] + [(m, t, 1, 1.0) for m in MODELS for t in (64, 256)],
)
def test_real_models_lose_less(
    assets: Path, tmp_path: Path, name: str, tokens: int, samples: int, share: float
) -> None:
    """KL divergence on stories that were not calibrated on; with two windows, one of them held out, of fewer tokens than the
    layers have channels, it is no worse than plain GPTQ either."""
    source = assets / "models" / name
    stories = (assets / "data" / "tinystories_317.txt").read_text().split("<|endoftext|>")
    ids = load_tokenizer(source).encode(" ".join(stories[-40:]), bos=True)[: 8 * 200]
    text = tmp_path / "train.txt"
    text.write_text("<|endoftext|>".join(stories[:200]))
    found = {}
    for options in ("target=layer,refit=false,polish=0", ALL):
        out = tmp_path / options.split(",")[0]
        compress(source, out, [f"{STEP},{options}"], calibration=text, samples=samples, window=tokens)
        found[options] = divergence(out, source, torch.tensor(ids).view(8, 200))
    plain, better = found.values()
    assert better <= share * plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "best"}, "target='best' is unknown: use layer or dense"),
        ({"polish": -1}, "polish=-1 must lie between 0 and 20 sweeps"),
        ({"polish": 21}, "polish=21 must lie"),
    ],
)
def test_bad_further_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Gptq(**options)
