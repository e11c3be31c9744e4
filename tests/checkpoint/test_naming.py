"""Folders that hold something else than a causal language model under its own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve import convert, load_model
from halve.checkpoint.reader import find_model, open_checkpoint
from halve.errors import CheckpointError
from tests.common import logits

Rename = Callable[[str], str | None]


def changed(source: Path, target: Path, rename: Rename, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy whose tensors are renamed, or left out where `rename` gives None."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    renamed = {name: tensor for old, tensor in tensors.items() if (name := rename(old)) is not None}
    save_file(renamed | (extra or {}), target / "model.safetensors")
    return target


def set_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture(scope="module", params=[("llama", False), ("qwen2", True), ("opt", True)], ids=lambda p: p[0])
def model(request: pytest.FixtureRequest, make_hf) -> Path:
    return make_hf(request.param[0], tie_word_embeddings=request.param[1])


WRAPPERS: dict[str, Rename] = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "each block compiled": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "a text part": lambda name: f"language_model.{name}",
    "a text part below": lambda name: name.replace("model.", "model.language_model.", 1),
    "sharded": lambda name: f"_fsdp_wrapped_module.{name}",
}


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_what_wrappers_add_is_seen_through(model: Path, tmp_path: Path, wrapped: str) -> None:
    folder = changed(model, tmp_path / "wrapped", WRAPPERS[wrapped])
    assert torch.equal(logits(folder), logits(model))


def test_two_tensors_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    name = next(iter(open_checkpoint(model).tensors.shapes))
    folder = changed(model, tmp_path / "twice", lambda n: n, {f"module.{name}": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"'module.{name}'.* both '{name}'.* leave one of them out"):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_model_without_its_head_is_told(make_hf, tmp_path: Path, prefixed: bool) -> None:
    def rename(name: str) -> str | None:
        return None if name == "lm_head.weight" else name if prefixed else name.removeprefix("model.")

    folder = changed(make_hf("llama"), tmp_path / "base", rename)
    set_config(folder, architectures=["LlamaModel"])
    with pytest.raises(CheckpointError, match=r"without its output head, 'lm_head.weight' \(.*LlamaModel\).*give the"):
        load_model(folder)
    set_config(folder, tie_word_embeddings=True)
    assert load_model(folder).config.tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("LlamaForSequenceClassification", "score.weight"),
        ("LlamaForQuestionAnswering", "qa_outputs.weight"),
        ("LlavaForConditionalGeneration", "vision_tower.embed.weight"),
    ],
)
def test_a_model_of_another_task_is_told(make_hf, tmp_path: Path, kind: str, tensor: str, tied: bool) -> None:
    def rename(name: str) -> str | None:
        return None if name.startswith("lm_head") else name

    folder = changed(make_hf("llama"), tmp_path / "other", rename, {tensor: torch.zeros(2, 32)})
    set_config(folder, architectures=[kind], tie_word_embeddings=tied)
    with pytest.raises(CheckpointError, match=f"{tensor}.* no part of a causal language model .*{kind}.*give the"):
        load_model(folder)


def test_a_missing_tensor_is_told_beside_what_is_there(make_hf, tmp_path: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    folder = changed(make_hf("llama"), tmp_path / "holed", lambda name: None if name == gone else name)
    with pytest.raises(CheckpointError, match=f"{gone}' is missing; there are 29, such as 'lm_head.weight'"):
        load_model(folder)


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": "some/base"}', "[]", "{"])
def test_an_adapter_is_not_passed_over(make_hf, tmp_path: Path, content: str) -> None:
    base = "some/base" if "base" in content else "unknown"
    alone = tmp_path / "adapter"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(content)
    save_file({"lora_A": torch.zeros(1)}, alone / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{alone}: is an adapter of '{base}'.*merge it first"):
        open_checkpoint(alone)
    beside = Path(shutil.copytree(make_hf("llama"), tmp_path / "beside"))
    (beside / "adapter_config.json").write_text(content)
    for use in (open_checkpoint, find_model, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(
            CheckpointError, match=r"beside the weights, .*merge it first.*or move adapter_config\.json"
        ):
            use(beside)
