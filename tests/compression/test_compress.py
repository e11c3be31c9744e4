"""Recipes end to end on small models of every family: reload here and in transformers, resume, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from halve import compress
from halve.checkpoint.reader import open_checkpoint
from halve.compression import compress as compression
from halve.errors import HalveError, OutputError, RecipeError
from tests.common import (
    COMPANIONS,
    FAMILIES,
    add_companions,
    companions,
    logits,
    relative,
    their_logits,
    write_word_tokenizer,
)

STEPS = ["rtn:bits=8", "rtn:bits=4,group_size=16", "rtn:bits=4,group_size=32,fallback=channel", "rtn:bits=3"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_result_loads_in_transformers_with_our_logits(
    make_hf, tmp_path: Path, kind: str, options: dict, step: str
) -> None:
    source = make_hf(kind, **options)
    compress(source, tmp_path / "out", [step])
    ours = logits(tmp_path / "out")
    assert relative(ours, their_logits(tmp_path / "out")) < 1e-5
    assert 1e-4 < relative(ours, logits(source)) < 1  # it was quantized, and it is the same model


@pytest.mark.parametrize("step", ["rtn:bits=8,symmetric=false", "rtn:bits=4,group_size=16,symmetric=false"])
def test_asymmetric_loads_dequantized(make_hf, tmp_path: Path, step: str) -> None:
    """compressed-tensors 0.20 does not size packed zero points on transformers' default path (docs/formats.md)."""
    compress(make_hf("llama"), tmp_path / "out", [step])
    theirs = their_logits(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert relative(logits(tmp_path / "out"), theirs) < 1e-5


def test_quantized_head_leaves_the_tied_embedding(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama", tie_word_embeddings=True)
    compress(source, tmp_path / "out", ["rtn:bits=8,targets=lm_head,untie=true"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(before.tensor(name), after.tensor(name))
    assert "lm_head.weight_packed" in after.tensors.shapes
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


def test_two_steps_mix_schemes(make_hf, tmp_path: Path) -> None:
    steps = ["rtn:bits=4,group_size=16,targets=q_proj|k_proj|v_proj", "rtn:bits=8,targets=Linear|lm_head"]
    result = compress(make_hf("llama"), tmp_path / "out", steps)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {s.bits for s in checkpoint.schemes.values()} == {4, 8}
    assert checkpoint.schemes["model.layers.0.self_attn.q_proj"].bits == 4
    second = {row["name"]: row for row in result.manifest["steps"][1]["linears"]}
    assert second["model.layers.0.self_attn.q_proj"]["reason"] == "already quantized (int4 g16)"
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


def test_every_linear_is_listed_and_bytes_are_true(make_hf, tmp_path: Path) -> None:
    result = compress(make_hf("qwen2"), tmp_path / "out", ["rtn:bits=8,ignore=down_proj"])
    rows = {row["name"]: row for row in result.manifest["steps"][0]["linears"]}
    assert len(rows) == 3 * 7 + 1
    assert rows["model.layers.1.mlp.down_proj"]["reason"] == "ignored"
    assert "lm_head" in rows["lm_head"]["reason"]
    stored: dict[str, int] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            layer = name.rsplit(".", 1)[0]
            stored[layer] = stored.get(layer, 0) + tensor.nbytes
    for name, row in rows.items():
        assert row["bytes_after"] == stored[name], name
    assert result.plan.bytes_after == sum(stored.values())


def test_fp16_source_keeps_its_precision(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama")
    model = AutoModelForCausalLM.from_pretrained(source).half()
    model.save_pretrained(tmp_path / "half")
    compress(tmp_path / "half", tmp_path / "out", ["rtn:bits=8,targets=q_proj"])
    before, after = open_checkpoint(tmp_path / "half"), open_checkpoint(tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        assert torch.equal(before.tensor(name), after.tensor(name))


def test_dtype_is_that_of_what_is_written(make_hf, tmp_path: Path) -> None:
    compress(make_hf("llama"), tmp_path / "out", ["rtn:bits=8"], dtype=torch.bfloat16)
    after = open_checkpoint(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    assert after.tensors.dtypes["model.layers.0.mlp.up_proj.weight_scale"] == torch.bfloat16
    assert "bfloat16" in (tmp_path / "out" / "config.json").read_text()


def test_what_goes_with_the_weights_goes_along(make_hf, tmp_path: Path) -> None:
    """Through every step, and a chat template asked for by name is found; --overwrite knows all of it as a model's."""
    source = Path(shutil.copytree(make_hf("llama"), tmp_path / "source"))
    write_word_tokenizer(source, ["w"])
    add_companions(source)
    write_word_tokenizer(source, ["w"])
    compress(source, tmp_path / "out", ["rtn:bits=8", "rtn:bits=8,targets=lm_head"])
    assert companions(tmp_path / "out").keys() == {*COMPANIONS, "tokenizer_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_chat_template("tools") == "text of additional_chat_templates/tools.jinja"
    compress(source, tmp_path / "out", ["rtn:bits=4"], overwrite=True)


def test_equal_runs_give_equal_bytes(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama")
    for name in ("a", "b"):
        compress(source, tmp_path / name, ["rtn:bits=4,group_size=16", "rtn:bits=8,targets=lm_head"])
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        if name != "halve-log.jsonl":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_compressing_a_compressed_model_keeps_its_history(make_hf, tmp_path: Path) -> None:
    compress(make_hf("llama"), tmp_path / "a", ["rtn:bits=4,group_size=16,targets=up_proj"])
    compress(tmp_path / "a", tmp_path / "b", ["rtn:bits=8"])
    manifest = json.loads((tmp_path / "b" / "halve.json").read_text())
    assert [s["bits"] for s in manifest["recipe"]] == [4, 8] and len(manifest["steps"]) == 2


@pytest.mark.parametrize("crash_at", [1, 4, 6])
def test_an_interrupted_run_is_continued(make_hf, tmp_path: Path, monkeypatch, crash_at: int) -> None:
    """Killed while writing some shard (3 blocks + rest, two steps): the same call finishes with the same bytes."""
    source, steps = make_hf("llama"), ["rtn:bits=4,group_size=16", "rtn:bits=8,targets=lm_head"]
    compress(source, tmp_path / "whole", steps)
    writes = 0
    original = compression.CheckpointWriter.write

    def crashing(self, part, tensors, rows):
        nonlocal writes
        writes += 1
        if writes == crash_at + 1:
            raise KeyboardInterrupt
        original(self, part, tensors, rows)

    monkeypatch.setattr(compression.CheckpointWriter, "write", crashing)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()
    writes = -1000
    compress(source, tmp_path / "out", steps)
    assert writes + 1000 == 8 - crash_at  # nothing that was finished is done again
    for path in (tmp_path / "whole").iterdir():
        if path.name != "halve-log.jsonl":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not (tmp_path / "out.partial").exists()


def test_another_request_does_not_take_over_unfinished_work(make_hf, tmp_path: Path, monkeypatch) -> None:
    source = make_hf("llama")
    monkeypatch.setattr(compression, "_verify", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", ["rtn:bits=8"])
    monkeypatch.undo()
    with pytest.raises(OutputError, match="unfinished run of another request"):
        compress(source, tmp_path / "out", ["rtn:bits=4"])
    compress(source, tmp_path / "out", ["rtn:bits=4"], overwrite=True)
    assert set(s.bits for s in open_checkpoint(tmp_path / "out").schemes.values()) == {4}


def test_out_that_holds_something_is_refused_then_replaced(make_hf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        compress(make_hf("llama"), out, ["rtn"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and (out / "precious.txt").exists()
    with pytest.raises(OutputError, match="holds no model but precious"):
        compress(make_hf("llama"), out, ["rtn"], overwrite=True)
    (out / "precious.txt").unlink()
    compress(make_hf("llama"), out, ["rtn:bits=8"])
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        compress(make_hf("llama"), out, ["rtn:bits=4"])
    compress(make_hf("llama"), out, ["rtn:bits=4"], overwrite=True)
    assert set(s.bits for s in open_checkpoint(out).schemes.values()) == {4}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_disk_too_small_is_said_before_any_work(make_hf, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(compression.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="1,000 bytes free"):
        compress(make_hf("llama"), tmp_path / "out", ["rtn"])
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_keeps_finished_blocks(make_hf, tmp_path: Path, monkeypatch) -> None:
    """ENOSPC from the operating system in the middle: a clear error, no half-written shard, and a run that goes on."""
    from halve.checkpoint import writer

    source, original, count = make_hf("llama"), writer.save_shard, 0

    def full(tensors, path):
        nonlocal count
        count += 1
        if count == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(writer, "save_shard", full)
    with pytest.raises(OutputError, match="disk is full"):
        compress(source, tmp_path / "out", ["rtn"])
    shards = sorted(p.name for p in (tmp_path / "out.partial" / "step-1").glob("model-*"))
    assert shards == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    compress(source, tmp_path / "out", ["rtn"])
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no step given"),
        (["gptz"], "unknown step 'gptz'"),
        (["rtn:bites=4"], "unknown option 'bites'"),
        (["rtn:bits"], "'bits' is not of the form key=value"),
        (["rtn:bits=four"], "not a whole number"),
        (["rtn:symmetric=maybe"], "not true or false"),
        (["rtn:bits=4,bits=8"], "given twice"),
        (["rtn:bits=4,group_size=128"], r"128 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q_proj"),
        (["rtn:targets=w_proj"], "'w_proj' matches no linear"),
        (["rtn:targets=re:("], "not a regular expression"),
        (["rtn:ignore=*"], "matched nothing to do"),
        (["rtn", "rtn"], "already quantized"),
        (["rtn:fallback=guess"], "fallback='guess'"),
    ],
)
def test_impossible_recipes(make_hf, tmp_path: Path, steps: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        compress(make_hf("llama"), tmp_path / "out", steps)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_source_leaves_nothing_published(make_hf, tmp_path: Path) -> None:
    source = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalveError, match="NaN"):
        compress(source, tmp_path / "out", ["rtn"])
    assert not (tmp_path / "out").exists()


def test_real_models_reload_in_transformers(assets: Path, tmp_path: Path) -> None:
    for name in ("stories260K", "babyllama-tok361"):
        for step in ("rtn:bits=8", "rtn:bits=4,group_size=32,fallback=channel"):
            out = tmp_path / f"{name}-{step[9]}"
            compress(assets / "models" / name, out, [step])
            assert relative(logits(out), their_logits(out)) < 1e-5
