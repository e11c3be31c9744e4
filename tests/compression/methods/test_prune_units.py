"""prune-mlp and prune-heads end to end: narrower ordinary models, and errors that the refit only lowers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halve import compress, load_model, load_tokenizer
from halve.checkpoint.reader import open_checkpoint
from halve.compression import step_run
from halve.compression.recipe import parse_step
from halve.errors import RecipeError
from tests.common import FAMILIES, TOKENS, logits, relative, their_logits


@pytest.fixture(scope="module")
def real(assets: Path) -> dict[str, str | int | Path]:
    """Calibration settings for the real model."""
    return {"calibration": str(assets / "data" / "tinystories_317.txt"), "samples": 8, "window": 128}


@pytest.fixture(scope="module")
def stories(assets: Path) -> Path:
    return assets / "models" / "stories260K"


def rows(result, role: str) -> list[dict]:
    return [line for line in result.manifest["steps"][-1]["linears"] if line["name"].endswith(role)]


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize(
    ("step", "widths"),
    [("prune-mlp:fraction=0.25,multiple_of=4", (4, 2, 36)), ("prune-heads:fraction=0.5", (2, 1, 48))],
)
def test_uniform_widths_load_in_transformers(
    make_hf, tmp_path: Path, kind: str, options: dict, step: str, widths: tuple
) -> None:
    if kind in ("olmo2", "olmo3") and "heads" in step:
        with pytest.raises(RecipeError, match="over all heads together"):
            compress(make_hf(kind, **options), tmp_path / "out", [step])
        return
    compress(make_hf(kind, **options), tmp_path / "out", [step + ",score=l1,refit=false"])
    layer = open_checkpoint(tmp_path / "out").config.layers[1]
    expected = (widths[0], widths[0], widths[2]) if kind == "opt" else widths
    assert (layer.num_heads, layer.num_kv_heads, layer.intermediate_size) == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if kind in ("opt", "stablelm") and "heads" in step:
        assert config["model_type"] == "halve"  # they have no head_dim field to say it with
        assert torch.isfinite(logits(tmp_path / "out")).all()
        return
    assert config["model_type"] == kind
    if "heads" in step:
        assert config["head_dim"] == options.get("head_dim", 8)
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


@pytest.mark.parametrize("step", ["prune-mlp:fraction=0.25,multiple_of=4", "prune-heads:fraction=0.5"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_equals_the_full_model_with_the_readers_columns_zeroed(make_hf, tmp_path: Path, kind: str, step: str) -> None:
    source = make_hf(kind)
    compress(source, tmp_path / "out", [step + ",score=l1,refit=false"])
    role = "down_proj" if "mlp" in step else "o_proj"
    model, family = AutoModelForCausalLM.from_pretrained(source), open_checkpoint(source).family
    for layer in range(3):
        full = model.get_parameter(family.block_name(layer, role) + ".weight")
        left = open_checkpoint(tmp_path / "out").block(layer, torch.float32).linears[role].weight
        # columns of random numbers are told apart by their values
        kept = [int((full == column.unsqueeze(1)).all(0).nonzero()) for column in left.t()]  # type: ignore[union-attr]
        assert kept == sorted(kept) and 0 < len(kept) < full.shape[1]
        with torch.no_grad():
            full[:, [c for c in range(full.shape[1]) if c not in kept]] = 0
    with torch.inference_mode():
        assert relative(logits(tmp_path / "out"), model(TOKENS).logits) < 1e-5


def test_refit_lowers_the_error_and_held_out_output_error_is_reported(
    stories: Path, real: dict, tmp_path: Path
) -> None:
    for step, role in (("prune-mlp:fraction=0.3,multiple_of=4", "down_proj"), ("prune-heads:fraction=0.25", "o_proj")):
        for score in ("l1", "activation", "obs"):
            result = compress(stories, tmp_path / "out", [f"{step},score={score}"], overwrite=True, **real)
            measured = rows(result, role)
            assert len(measured) == 5
            for row in measured:
                assert row["output_error"] <= row["output_error_before_refit"]
                assert 0 < row["held_out_output_error"] < row["held_out_output_error_before_refit"]


def test_a_refit_that_rounding_would_undo_is_left_out(stories: Path, real: dict, tmp_path: Path) -> None:
    """Channels that carry next to nothing go: in bfloat16, moving all other weights costs more than they did."""
    model = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :16] *= 1e-6
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        if (stories / name).exists():
            shutil.copy(stories / name, tmp_path / "model")
    step = "prune-mlp:widths=156|156|156|156|156,multiple_of=4"
    measured = rows(compress(tmp_path / "model", tmp_path / "out", [step], **real), "down_proj")
    assert len(measured) == 5
    for row in measured:
        assert 0 < row["output_error"] <= row["output_error_before_refit"]


def test_heads_that_do_not_divide_the_hidden_size_are_not_called_llama(make_hf, tmp_path: Path) -> None:
    """transformers refuses such a Llama config, and takes the same widths under the other types."""
    widths = {"num_attention_heads": 8, "num_key_value_heads": 4}
    for kind, expected in (("llama", "halve"), ("qwen2", "qwen2")):
        compress(make_hf(kind, **widths), tmp_path / kind, ["prune-heads:fraction=0.25,score=l1,refit=false"])
        assert json.loads((tmp_path / kind / "config.json").read_text())["model_type"] == expected
        assert open_checkpoint(tmp_path / kind).config.layers[0].num_heads == 6
    assert relative(logits(tmp_path / "qwen2"), their_logits(tmp_path / "qwen2")) < 1e-5


def test_reported_error_is_that_of_the_layer(stories: Path, real: dict, tmp_path: Path) -> None:
    """The first layer's inputs do not depend on earlier pruning, so its error can be measured from outside."""
    result = compress(stories, tmp_path / "out", ["prune-mlp:fraction=0.25,multiple_of=1"], **real)
    before, after = load_model(stories), load_model(tmp_path / "out")
    from halve.checkpoint.tokenizer import load_tokenizer
    from halve.compression.windows import CalibrationOptions, make_windows
    from halve.texts import read_documents

    documents = read_documents(real["calibration"])
    windows = make_windows(documents, load_tokenizer(stories), CalibrationOptions("text", 8, 128), 512)
    caught: list[torch.Tensor] = []
    for model in (before, after):
        model.blocks[0].linears["down_proj"].register_forward_hook(lambda _m, _x, y: caught.append(y.double()))  # type: ignore[index]
        with torch.inference_mode():
            model(windows.held_out)
    assert rows(result, "down_proj")[0]["held_out_output_error"] == pytest.approx(relative(*caught[::-1]), rel=1e-4)


def test_obs_leaves_less_error_than_the_other_scores(stories: Path, real: dict, tmp_path: Path) -> None:
    for refit in ("true", "false"):
        error = {}
        for score in ("l1", "activation", "obs"):
            step = f"prune-mlp:fraction=0.3,multiple_of=4,score={score},refit={refit}"
            if score == "l1" and refit == "false":
                continue  # needs no data, so measures none
            result = compress(stories, tmp_path / "out", [step], overwrite=True, **real)
            error[score] = rows(result, "layers.0.mlp.down_proj")[0]["output_error"]
        assert error["obs"] == min(error.values())


def test_global_allocation_keeps_the_total_and_goes_where_it_costs_least(
    stories: Path, real: dict, tmp_path: Path
) -> None:
    step = "prune-mlp:fraction=0.2,multiple_of=4,allocation=global"
    result = compress(stories, tmp_path / "out", [step], **real)
    widths = [layer.intermediate_size for layer in open_checkpoint(tmp_path / "out").config.layers]
    assert len(set(widths)) > 1 and all(w % 4 == 0 or w == 172 for w in widths)
    assert 5 * 136 - 4 < sum(widths) <= 5 * 136
    done = result.manifest["steps"][0]
    assert done["resolved"]["widths"] == [str(w) for w in widths] and done["widths"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "halve"
    assert torch.isfinite(logits(tmp_path / "out")).all()
    by_hand = f"prune-mlp:multiple_of=4,widths={'|'.join(map(str, widths))}"
    compress(stories, tmp_path / "again", [by_hand], **real)
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))


def test_prune_then_quantize_and_quantize_then_prune(make_hf, tmp_path: Path) -> None:
    source = make_hf("qwen2")
    prune = "prune-mlp:fraction=0.33,multiple_of=16,score=l1,refit=false"
    compress(source, tmp_path / "a", [prune, "rtn:bits=4,group_size=16"])
    compress(source, tmp_path / "b", ["rtn:bits=8", prune, "prune-heads:fraction=0.5,score=l1,refit=false"])
    for out in ("a", "b"):
        assert json.loads((tmp_path / out / "config.json").read_text())["model_type"] == "qwen2"
        assert relative(logits(tmp_path / out), their_logits(tmp_path / out)) < 1e-5
    compress(source, tmp_path / "c", ["rtn:bits=4,group_size=16", prune])
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == "halve"  # ragged groups
    for after, before in zip(*(open_checkpoint(tmp_path / f).schemes.items() for f in ("c", "a")), strict=True):
        assert after == before
    assert torch.isfinite(logits(tmp_path / "c")).all()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["prune-mlp"], "multiple_of=8"),  # 48 channels
        (["prune-mlp:multiple_of=4,widths=12|12"], "names 2 layers, the model has 3"),
        (["prune-mlp:multiple_of=4,widths=12|60|12"], "60 of 48 channels in layer 1"),
        (["prune-mlp:multiple_of=4,widths=12|0|12"], "0 of 48 channels in layer 1"),
        (["prune-heads:fraction=0.1"], "0.5"),
        (["prune-heads:fraction=0.9"], "0.5"),
        (["l1-outputs:fraction=0.2", "prune-mlp:multiple_of=4"], "put this step before pruning per linear"),
        (["l1-outputs:fraction=0.2,targets=*v_proj", "prune-heads:fraction=0.5"], "v_proj 13 of 16"),
        (["rtn:bits=8", "prune-mlp:multiple_of=4"], "prune before quantizing, or use refit=false"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(make_hf, tmp_path: Path, steps: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        compress(make_hf("llama"), tmp_path / "out", steps, calibration="no such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        "fraction=1",
        "fraction=0.9,allocation=global",
        "score=l2",
        "allocation=even",
        "multiple_of=0",
        "damping=0",
        "damping=2",
        "widths=4|x",
    ],
)
@pytest.mark.parametrize("step", ["prune-mlp", "prune-heads"])
def test_options_out_of_range_are_refused(step: str, options: str) -> None:
    with pytest.raises(RecipeError, match=options.split("=")[0]):
        parse_step(f"{step}:{options}")


def test_fraction_zero_changes_nothing(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama")
    for step in ("prune-mlp", "prune-heads"):
        compress(source, tmp_path / step, [f"{step}:fraction=0,score=l1,refit=false"])
        assert torch.equal(logits(tmp_path / step), logits(source))


def test_a_resumed_run_gives_the_same_bytes(stories: Path, real: dict, tmp_path: Path, monkeypatch) -> None:
    """The blocks done are read back, narrower as they are, and calibrate the rest."""
    steps = ["prune-mlp:fraction=0.2,multiple_of=4,allocation=global", "prune-heads:fraction=0.25"]
    compress(stories, tmp_path / "whole", steps, **real)
    original, calls = step_run._block_tensors, []

    def crash(*arguments):
        calls.append(None)
        if len(calls) in (3, 9):  # the third block of the first step, then of the second
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(step_run, "_block_tensors", crash)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(stories, tmp_path / "out", steps, **real)
    compress(stories, tmp_path / "out", steps, **real)
    for path in (tmp_path / "whole").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert (tmp_path / "whole" / "halve.json").read_bytes() == (tmp_path / "out" / "halve.json").read_bytes()


def test_a_choice_that_a_later_step_cannot_take_is_found_before_the_pass(
    stories: Path, real: dict, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("halve.compression.methods.prune_units.allocate", lambda *_: [136, 136, 132, 136, 140])
    steps = ["prune-mlp:fraction=0.2,multiple_of=4,allocation=global", "rtn:bits=4,group_size=8"]
    with pytest.raises(RecipeError, match="group_size=8 does not divide the 132 inputs"):
        compress(stories, tmp_path / "out", steps, **real)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_key_value_head_has_nothing_to_distribute(stories: Path, real: dict, make_hf, tmp_path: Path) -> None:
    source = make_hf("llama", num_key_value_heads=1)
    with pytest.raises(RecipeError, match="leave this step out"):
        compress(source, tmp_path / "out", ["prune-heads:allocation=global"], **real)
    for score in ("l1", "obs"):
        step = f"prune-heads:fraction=0,allocation=global,score={score},refit=false"
        compress(stories, tmp_path / score, [step], **real)
        assert torch.equal(logits(tmp_path / score), logits(stories))


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_every_family_can_be_refitted_towards_the_dense_stream(
    make_hf, tmp_path: Path, drawn_windows: None, kind: str, options: dict, monkeypatch
) -> None:
    monkeypatch.setattr("halve.compression.methods.problem.TOKENS_PER_CHANNEL", 1)
    result = compress(
        make_hf(kind, **options),
        tmp_path / "out",
        ["prune-mlp:fraction=0.33,multiple_of=16,target=dense"],
        calibration="drawn",
    )
    assert torch.isfinite(logits(tmp_path / "out")).all()
    role = "fc2" if kind == "opt" else "down_proj"
    assert all(row["alpha"] in (0.0, 0.25, 0.5) for row in rows(result, role))


@torch.inference_mode()
def test_heads_refitted_towards_the_dense_stream_cost_less(stories: Path, assets: Path, tmp_path: Path) -> None:
    texts = (assets / "data" / "tinystories_317.txt").read_text().split("<|endoftext|>")
    train = tmp_path / "train.txt"
    train.write_text("<|endoftext|>".join(texts[:200]))
    tokens = torch.tensor(load_tokenizer(stories).encode(" ".join(texts[-20:]), bos=True)[: 6 * 200]).view(6, 200)
    dense, cost = load_model(stories)(tokens).log_softmax(-1), {}
    for target in ("layer", "dense"):
        step = f"prune-heads:fraction=0.25,target={target}"
        result = compress(stories, tmp_path / target, [step], calibration=train, samples=24, window=256)
        assert ("alpha" in rows(result, "o_proj")[1]) == (target == "dense")
        cost[target] = float(
            (dense.exp() * (dense - load_model(tmp_path / target)(tokens).log_softmax(-1))).sum(-1).mean()
        )
    assert cost["dense"] < cost["layer"]
