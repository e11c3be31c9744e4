"""Which files of a model folder are what it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from halve.checkpoint.identity import model_identity, model_sha256

READ = ["config.json", "halve.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
READ += [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
]
OTHERS = [
    "README.md",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "figures.json",
    ".hidden",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the hub's cache has one: links to files elsewhere."""
    made = tmp_path / "snapshots" / "0123abcd"
    made.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for name in (*READ, *OTHERS):
        (tmp_path / "blobs" / name).write_text(name)
        (made / name).symlink_to(tmp_path / "blobs" / name)
    weights = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "blobs" / "model.safetensors.index.json").write_text(json.dumps(weights))
    return made


def test_what_is_read_or_copied_and_the_commit(folder: Path) -> None:
    found = model_identity(folder)
    assert found.pop("hub commit") == "0123abcd"
    assert found == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in READ}


def test_one_file_holds_the_weights_before_an_index(folder: Path) -> None:
    (folder / "model.safetensors").write_text("one")  # also beside an index, which is then not read
    found = model_identity(folder)
    assert {name for name in found if name.endswith(".safetensors")} == {"model.safetensors"}


def test_random_weights_are_no_file(folder: Path, tmp_path: Path) -> None:
    found = model_identity(folder.rename(tmp_path / "local"), weights=False)
    assert "config.json" in found and "hub commit" not in found
    assert not [name for name in found if name.endswith(".safetensors")]


def test_the_hash_of_a_model_is_that_of_what_it_computes_with(folder: Path) -> None:
    def touched(name: str) -> str:
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b" ")
        found = model_sha256(folder)
        path.unlink() if before is None else path.write_bytes(before)
        return found

    own = model_sha256(folder)
    alike = {name for name in (*READ, *OTHERS, "LICENSE", "NOTICE.txt", "USE_POLICY.md") if touched(name) == own}
    assert alike == {*OTHERS, "halve.json", "LICENSE", "NOTICE.txt", "USE_POLICY.md"}
    elsewhere = shutil.copytree(folder, folder.parents[1] / "local")
    assert model_sha256(elsewhere) == own
