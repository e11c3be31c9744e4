"""Folders of several dtypes: what no step touches stays as it is, what a step writes has the dtype of what it replaces."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve import compress, evaluate, load_model
from halve.checkpoint.reader import open_checkpoint
from halve.errors import CheckpointError
from tests.common import FAMILIES, logits, relative, their_logits, write_word_tokenizer

STEPS = [
    "rtn:bits=8,targets=*q_proj|*layers.0.*",
    "rtn:bits=4,group_size=16,targets=Linear|lm_head,untie=true",
    "gptq:bits=4,group_size=16,targets=*v_proj|*layers.2.*",
    "prune-mlp:fraction=0.5,multiple_of=8",
    "l1-outputs:fraction=0.2,targets=*v_proj",
    "drop-layers:layers=1",
]


pytestmark = pytest.mark.usefixtures("drawn_windows")


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def in_dtypes(source: Path, out: Path, dtypes: dict[str, torch.dtype], named: str | None = None) -> Path:
    """The model with some tensors, by how their names end, in other dtypes, and what its config says of that."""
    shutil.copytree(source, out)
    tensors = stored(source)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(next((d for end, d in dtypes.items() if name.endswith(end)), tensor.dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    raw = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k not in ("dtype", "torch_dtype")}
    (out / "config.json").write_text(json.dumps(raw if named is None else raw | {"torch_dtype": named}))
    return out


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_each_tensor_keeps_its_dtype(make_hf, tmp_path: Path, kind: str, options: dict[str, Any], step: str) -> None:
    """A dtype drawn for every tensor."""
    draw = random.Random(kind + step)
    whole = make_hf(kind, **options)
    dtypes = {n: draw.choice([torch.float32, torch.bfloat16, torch.float16]) for n in stored(whole)}
    source = in_dtypes(whole, tmp_path / "source", dtypes, "float32")
    result = compress(source, tmp_path / "out", [step])
    before, after = stored(source), stored(tmp_path / "out")
    touched = {row["name"] for row in result.manifest["steps"][0]["linears"] if row["action"] != "skipped"}
    for name, tensor in after.items():
        there = name.replace("layers.1.", "layers.2.") if step.startswith("drop") else name
        linear, part = name.rsplit(".", 1)
        if linear not in touched or step.startswith("drop"):
            assert torch.equal(tensor, before[there]) and tensor.dtype == before[there].dtype, name
        elif tensor.is_floating_point():
            old = before.get(f"{linear}.bias" if part == "bias" else f"{linear}.weight")
            old = next(t for n, t in before.items() if n.endswith("embed_tokens.weight")) if old is None else old
            assert tensor.dtype == old.dtype, name
        if part == "bias" and tensor.shape == before[there].shape:
            assert torch.equal(tensor, before[there]), name
    assert result.plan.bytes_before == sum(t.nbytes for t in before.values())
    assert result.plan.bytes_after == sum(t.nbytes for t in after.values())
    if json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] != "halve":
        assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


@pytest.mark.parametrize("named", ["bfloat16", "float32", None])
def test_config_says_what_it_runs_in(make_hf, tmp_path: Path, named: str | None) -> None:
    """The embedding in float32 and layers in bfloat16: the result is smaller, and transformers runs it in the same dtype."""
    source = in_dtypes(make_hf("llama"), tmp_path / "source", {"proj.weight": torch.bfloat16}, named)
    compress(source, tmp_path / "out", ["drop-layers:layers=2"])
    assert sum(t.nbytes for t in stored(tmp_path / "out").values()) < sum(t.nbytes for t in stored(source).values())
    expected = named or "float32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == expected
    ours, theirs = logits(tmp_path / "out"), their_logits(tmp_path / "out")
    assert ours.dtype == theirs.dtype == getattr(torch, expected)
    assert relative(ours, theirs) < (0.02 if named == "bfloat16" else 1e-5)


def test_a_value_too_large_is_found_before_work(make_hf, tmp_path: Path) -> None:
    """bfloat16 reaches to 3e38, float16 to 65,504."""
    source = in_dtypes(make_hf("llama"), tmp_path / "source", {"": torch.bfloat16}, "bfloat16")
    tensors = stored(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -98304.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    told = r"layers\.1\.mlp\.up_proj\.weight holds 98304 and float16 ends at 65504: .*bf16 or fp32"
    with pytest.raises(CheckpointError, match=told):
        compress(source, tmp_path / "out", ["rtn:bits=8"], dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    with pytest.raises(CheckpointError, match=told):
        load_model(source, dtype=torch.float16)
    compress(source, tmp_path / "out", ["rtn:bits=8"])


def test_a_dtype_that_is_asked_for_is_that_of_everything(make_hf, tmp_path: Path) -> None:
    source = in_dtypes(make_hf("qwen2"), tmp_path / "source", {"norm.weight": torch.float32, "": torch.bfloat16})
    result = compress(source, tmp_path / "out", ["rtn:bits=8,targets=*q_proj"], dtype=torch.float16)
    after = stored(tmp_path / "out")
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.float16}
    assert result.plan.bytes_after == sum(t.nbytes for t in after.values())
    assert result.plan.bytes_before == sum(t.nbytes for t in stored(source).values())
    assert open_checkpoint(tmp_path / "out").dtype == torch.float16


def test_float16_runs_in_float32_on_the_cpu(make_hf, tmp_path: Path) -> None:
    source = in_dtypes(make_hf("llama"), tmp_path / "source", {"": torch.float16}, "float16")
    write_word_tokenizer(source, [f"w{number}" for number in range(90)])
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 89}" for number in range(200)))
    record = evaluate(source, task="perplexity", data=text, window=32)
    assert record["dtype"] == "float32"
    assert relative(logits(source), their_logits(source, dtype=torch.float32)) < 1e-5


def test_float64_is_read_as_float32(make_hf, tmp_path: Path) -> None:
    whole = make_hf("llama")
    source = in_dtypes(whole, tmp_path / "source", {"": torch.float64}, "float64")
    assert torch.equal(logits(source), logits(whole))
    result = compress(source, tmp_path / "out", ["rtn:bits=8,targets=*q_proj"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert result.plan.bytes_after == sum(t.nbytes for t in stored(tmp_path / "out").values())
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5
