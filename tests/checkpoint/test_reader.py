"""Folders that are wrong in every way a download or an edit can make them wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve import load_model
from halve.checkpoint.reader import open_checkpoint
from halve.errors import CheckpointError, HalveError
from tests.common import logits, relative, their_logits


@pytest.fixture
def folder(make_hf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_hf("llama", tie_word_embeddings=True), tmp_path / "model"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace (or with None drop) tensors named with __ for dots."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_missing_folder_and_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")


def test_hub_id_is_read_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the hub's cache already holds loads by its id, with no network."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--someone--tiny"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert open_checkpoint("someone/tiny").config.hidden_size == 32
    with pytest.raises(
        CheckpointError, match=r"someone/else: no such folder, not in the hub's cache .*, and the hub cannot be reached"
    ):
        open_checkpoint("someone/else")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)


def test_config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        open_checkpoint(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(folder)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        open_checkpoint(folder)


def test_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        open_checkpoint(folder)


def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, model__layers__0__mlp__up_proj__weight=torch.zeros(47, 32))
    with pytest.raises(CheckpointError, match=r"shape \[47, 32\], the config asks for \[48, 32\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity(folder: Path, bad: float) -> None:
    weight = torch.zeros(48, 32)
    weight[3, 4] = bad
    rewrite(folder, model__layers__2__mlp__gate_proj__weight=weight)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate_proj\.weight holds 1 NaN or infinite"):
        load_model(folder)


def test_tied_head_that_differs(folder: Path) -> None:
    rewrite(folder, lm_head__weight=torch.zeros(97, 32))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        open_checkpoint(folder)


def test_missing_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the shard is missing"):
        open_checkpoint(folder)


def shards(folder: Path, *parts: dict[str, torch.Tensor], index: dict[str, int]) -> None:
    """Write `parts` as shards, with an index that gives the number of the shard of each name."""
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, tensors in zip(files, parts, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: files[number] for name, number in index.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file_goes_before_an_index(folder: Path) -> None:
    """As in transformers: an index beside it is of an earlier save, whole or not."""
    tensors = load_file(folder / "model.safetensors")
    older = {name: tensor * 0.5 for name, tensor in tensors.items()}
    torch.save(older, folder / "pytorch_model.bin")
    for part in (older, {"only": torch.zeros(1)}):
        shards(folder, part, index=dict.fromkeys(older, 0))
        assert relative(logits(folder), their_logits(folder)) < 1e-5
        assert torch.equal(open_checkpoint(folder).tensor("model.norm.weight"), tensors["model.norm.weight"])


@pytest.mark.parametrize("right", [0, 1])
def test_a_name_in_two_shards_is_read_from_the_one_that_the_index_names(folder: Path, right: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    expected = logits(folder)
    twice = [name for name in tensors if "layers.1" in name]
    wrong = {name: tensors[name] * 3 for name in twice}
    parts = [
        {n: t for n, t in tensors.items() if "layers.2" not in n},
        {n: t for n, t in tensors.items() if "layers.2" in n},
    ]
    index = {name: number for number, part in enumerate(parts) for name in part} | dict.fromkeys(twice, right)
    parts[0] |= wrong if right else {}
    parts[1] |= {name: tensors[name] for name in twice} if right else wrong
    (folder / "model.safetensors").unlink()
    shards(folder, *parts, index=index)
    assert torch.equal(logits(folder), expected)
    shards(folder, *parts, index={name: number for name, number in index.items() if name not in twice})
    with pytest.raises(CheckpointError, match=r"layers\.1.*' is in .*00001-of.* and in .*00002-of.*names neither"):
        open_checkpoint(folder)


def test_a_file_of_another_name_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no model\.safetensors .* but weights\.safetensors: .*call it model\.safetensors"
    ):
        open_checkpoint(folder)


def test_names_without_prefix_are_read(folder: Path) -> None:
    """Some checkpoints were saved from the base model, whose names lack `model.`."""
    tokens = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        expected = load_model(folder)(tokens)
        tensors = load_file(folder / "model.safetensors")
        save_file({k.removeprefix("model."): v for k, v in tensors.items()}, folder / "model.safetensors")
        assert torch.equal(load_model(folder)(tokens), expected)


def test_config_alone_with_random_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = load_model(folder / "config.json", random_weights=True, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(9).unsqueeze(0))).all()


def test_weight_bytes_are_those_of_the_tensors(folder: Path) -> None:
    stored = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    model = load_model(folder)
    assert model.weight_bytes() == stored
    assert load_model(folder, dtype=torch.bfloat16).weight_bytes() == stored // 2


def test_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(HalveError, match="abacus"):
        load_model(folder, device="abacus")
