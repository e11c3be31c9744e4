"""A .bin folder becomes the same model in safetensors, and nothing but tensors is ever unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halve import load_model
from halve.checkpoint.convert import convert
from halve.errors import CheckpointError, OutputError
from tests.common import COMPANIONS, add_companions, companions, logits


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


def test_a_single_file_goes_before_an_index_and_the_index_decides_between_files(
    folder: Path, make_hf, tmp_path: Path
) -> None:
    single = folder / "pytorch_model.bin"
    state = torch.load(single, weights_only=True)
    names = list(state)
    halves = [{n: state[n] for n in names[:9]}, {n: state[n] for n in names[9:]}]
    halves[0] |= {n: t * 3 for n, t in halves[1].items()}
    weight_map = {n: f"pytorch_model-0000{1 if n in names[:9] else 2}-of-00002.bin" for n in names}
    for number, half in enumerate(halves, 1):
        torch.save(half, folder / f"pytorch_model-0000{number}-of-00002.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    single.rename(tmp_path / "single")
    convert(folder, tmp_path / "sharded")
    assert torch.equal(logits(tmp_path / "sharded"), logits(make_hf("opt")))
    (tmp_path / "single").rename(single)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.bin")}))
    convert(folder, tmp_path / "whole")
    assert torch.equal(logits(tmp_path / "whole"), logits(make_hf("opt")))


def test_safetensors_beside_are_what_is_read(make_hf, tmp_path: Path) -> None:
    """Equal ones are no matter; of others the user has to say which are meant."""
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "both"))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "same")
    torch.save({n: t * 2 for n, t in tensors.items()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: other weights than in the model\.safetensors"):
        convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_goes_with_the_weights_is_copied(folder: Path, tmp_path: Path) -> None:
    add_companions(folder)
    convert(folder, tmp_path / "out")
    assert companions(tmp_path / "out").keys() == set(COMPANIONS)
    assert companions(tmp_path / "out").items() <= companions(folder).items()
