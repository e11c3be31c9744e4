"""Nothing outside the model's folder is read or copied, whatever its files name or link to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halve import compress
from halve.checkpoint.convert import convert
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.errors import CheckpointError
from tests.common import write_word_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(make_hf, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "models" / "model"))
    write_word_tokenizer(folder, ["a"])
    return folder


@pytest.mark.parametrize("way", ["up", "up and back", "absolute", "link", "link to a folder", "circle"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_leaves_the_folder(folder: Path, tmp_path: Path, way: str, kind: str) -> None:
    secret = tmp_path / "models" / "secret"
    secret.mkdir()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(secret / "a.safetensors")
    if kind == "bin":
        torch.save(tensors, secret / "a.bin")
    names = {
        "up": f"../secret/a.{kind}",
        "up and back": f"sub/../../secret/a.{kind}",
        "absolute": str(secret / f"a.{kind}"),
        "link": f"b.{kind}",
        "link to a folder": f"sub/a.{kind}",
        "circle": f"c.{kind}",
    }
    (folder / f"b.{kind}").symlink_to(f"../secret/a.{kind}")
    (folder / f"c.{kind}").symlink_to(f"c.{kind}")
    (folder / "sub").symlink_to(secret)
    for name in ("b", "c"):
        if not way.startswith({"b": "link", "c": "circle"}[name]) or way == "link to a folder":
            (folder / f"{name}.{kind}").unlink()
    index = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, names[way])}))
    with pytest.raises(CheckpointError, match="not in the model's folder"):
        open_checkpoint(folder) if kind == "safetensors" else convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    "config.json model.safetensors tokenizer.json tokenizer.model vocab.txt chat_template.jinja generation_config.json "
    "halve.json quantize_config.json LICENSE additional_chat_templates".split(),
)
def test_files_that_are_links_to_outside(folder: Path, tmp_path: Path, name: str) -> None:
    path, secret = folder / name, tmp_path / "secret"
    if path.exists():
        path.rename(secret)
    elif "templates" in name:
        secret.mkdir()
    else:
        secret.write_text("{}")
    path.symlink_to(secret)
    for read in (
        open_checkpoint,
        load_tokenizer,
        lambda model: compress(str(model), str(tmp_path / "out"), ["rtn:bits=8"]),
    ):
        with pytest.raises(
            CheckpointError, match=f"{name}: is a link to .*secret, which is not in the model's folder: put"
        ):
            read(folder)
    assert not (tmp_path / "out").exists()


def test_links_that_stay_inside_or_are_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "blob").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blob")
    (folder / "notes").symlink_to("/etc/passwd")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    compress(str(linked), str(tmp_path / "out"), ["rtn:bits=8"])
    assert not any(path.is_symlink() or path.name == "notes" for path in (tmp_path / "out").iterdir())


def test_a_snapshot_of_the_hub_reads_its_own_blobs_alone(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    compress(str(snapshot), str(tmp_path / "out"), ["rtn:bits=8"])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(folder / "tokenizer.json", snapshot))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to"):
        open_checkpoint(snapshot)
