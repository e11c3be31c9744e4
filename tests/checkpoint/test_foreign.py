"""Quantized checkpoints of other tools are told by name, whatever their tensors are called and stored in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve import load_model
from halve.errors import CheckpointError, UnsupportedModelError

FP8 = torch.float8_e4m3fn
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(make_hf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))


def change(folder: Path, tensors: dict[str, torch.Tensor | None], quantization: dict[str, Any] | None) -> None:
    stored = load_file(folder / "model.safetensors") | tensors
    save_file(
        {n: t for n, t in stored.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"FP8 .*quant_method='fp8'"),
        ({"quant_method": "fbgemm_fp8"}, "FP8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, r"FP8 .*format='float-quantized'"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"w_bit": 4, "q_group_size": 128}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "AQLM"}, "AQLM"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "eetq"}, "EETQ"),
        ({"quant_method": "of next year"}, "of next year"),
        ({"some": "thing"}, "quant_method=None"),
    ],
)
def test_by_the_config(folder: Path, quantization: dict[str, Any], words: str) -> None:
    """Before any tensor is complained about: these are in dtypes and under names that nothing here knows."""
    change(folder, {f"{Q}.weight": torch.zeros(32, 32).to(FP8), f"{Q}.weight_scale": torch.ones(1)}, quantization)
    with pytest.raises(
        UnsupportedModelError, match=f"config.json: the weights are quantized by .*{words}.* take the model"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({".weight": torch.zeros(32, 32).to(FP8), ".weight_scale_inv": torch.ones(1, 1)}, "FP8"),
        ({".weight": torch.zeros(32, 32, dtype=torch.int8), ".SCB": torch.ones(32)}, "bitsandbytes"),
        ({".weight": torch.zeros(512, 1, dtype=torch.uint8), ".weight.absmax": torch.ones(16)}, "bitsandbytes"),
        ({".weight": None, ".codebooks": torch.ones(1, 8)}, "AQLM"),
        ({".weight": None, ".W_q": torch.zeros(8, dtype=torch.uint8)}, "HQQ"),
        ({".weight": None, ".qweight": torch.zeros(32, 4, dtype=torch.int32)}, "GPTQ or AWQ .*quantize_config.json"),
    ],
)
def test_by_the_tensors_where_the_config_is_silent(folder: Path, tensors: dict[str, Any], words: str) -> None:
    change(folder, {f"{Q}{part}": tensor for part, tensor in tensors.items()}, None)
    with pytest.raises(UnsupportedModelError, match=words):
        load_model(folder)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8, torch.int16, torch.bool])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_nothing_is_computed_with(folder: Path, name: str, dtype: torch.dtype) -> None:
    shape = load_file(folder / "model.safetensors")[name].shape
    change(folder, {name: torch.zeros(shape).to(dtype)}, None)
    told = f"'{name}' is stored in {str(dtype).removeprefix('torch.')}, which is not read: .*bf16"
    with pytest.raises(CheckpointError, match=told):
        load_model(folder)


def test_a_config_that_describes_nothing(folder: Path) -> None:
    change(folder, {}, {})
    load_model(folder)
    change(folder, {}, "gptq")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="quantization_config='gptq'"):
        load_model(folder)
