"""A .bin folder becomes the same model in safetensors, and nothing but tensors is ever unpickled."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halve import load_model
from halve.checkpoint.convert import convert
from halve.errors import CheckpointError, OutputError


@pytest.fixture
def folder(make_hf, tmp_path: Path) -> Path:
    """An OPT model saved the way its published checkpoints are: names without `model.`, head stored again."""
    folder = Path(shutil.copytree(make_hf("opt"), tmp_path / "bin"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = {k.removeprefix("model."): v for k, v in tensors.items()}
    state["lm_head.weight"] = state["decoder.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_same_model(make_hf, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="halve convert"):
        load_model(folder)
    convert(folder, tmp_path / "out")
    tokens = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "out")(tokens), load_model(make_hf("opt"))(tokens))


def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(CheckpointError, match="not a plain file of tensors"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_out_not_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(OutputError, match="not empty"):
        convert(folder, tmp_path / "out")


def test_no_bin(make_hf, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert(make_hf("llama"), tmp_path / "out")
