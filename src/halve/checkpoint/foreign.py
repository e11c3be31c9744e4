"""Quantized checkpoints of other tools: which of them are read, and the others told by name.

`quant_method` in config.json says what they are; where it says nothing, the names of the tensors do.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halve.checkpoint.tensors import INDEX, SINGLE, read_json
from halve.errors import CheckpointError, UnsupportedModelError, shown

READ = ("compressed-tensors", "gptq")
OLD_GPTQ = "quantize_config.json"  # of AutoGPTQ, before config.json held it
NAMES = {
    "awq": "AWQ (4-bit integers)",
    "bitsandbytes": "bitsandbytes (8-bit integers or NF4)",
    "fp8": "FP8 (8-bit floats, scales by block)",
    "fbgemm_fp8": "FP8 (8-bit floats, fbgemm)",
    "hqq": "HQQ",
    "aqlm": "AQLM (codebooks)",
    "quanto": "quanto",
    "mxfp4": "MXFP4 (4-bit floats)",
    "eetq": "EETQ (8-bit integers)",
    "float-quantized": "FP8 (8-bit floats, compressed-tensors)",
    "naive-quantized": "8-bit numbers not packed (compressed-tensors)",
    "int-quantized": "8-bit integers not packed (compressed-tensors)",
    "nvfp4-pack-quantized": "NVFP4 (4-bit floats, compressed-tensors)",
    "mxfp4-pack-quantized": "MXFP4 (4-bit floats, compressed-tensors)",
    "marlin-24": "Marlin with 2:4 sparsity (compressed-tensors)",
}
# fields that only one tool writes, of configs that do not name it
_FIELDS = {
    "config_groups": "compressed-tensors",
    "w_bit": "awq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "weight_block_size": "fp8",
    "bits": "gptq",
}
# how a name ends that only one tool gives a tensor
_ENDINGS = {
    ".weight_scale_inv": "fp8",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".codebooks": "aqlm",
    ".W_q": "hqq",
    "_blocks": "mxfp4",
    ".weight._data": "quanto",
}


def quantization_of(folder: Path, raw: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights of a folder are quantized, its `quant_method` one of READ; None: they are not.

    Raises UnsupportedModelError for any other method, CheckpointError for what is not a description.
    """
    origin, config = folder / "config.json", raw.get("quantization_config")
    if config is None and (folder / OLD_GPTQ).is_file():
        origin = folder / OLD_GPTQ
        config = {"quant_method": "gptq"} | read_json(origin)
    if config is None or config == {}:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{origin}: quantization_config={shown(config)} must be an object: get the model's own config.json"
        )
    named = config.get("quant_method") or next((name for key, name in _FIELDS.items() if config.get(key)), None)
    method = str(named).lower()
    if method not in READ:
        raise UnsupportedModelError(_refusal(str(origin), method, f"quant_method={shown(config.get('quant_method'))}"))
    kind = config.get("format")
    if method == "compressed-tensors" and isinstance(kind, str) and kind in NAMES:
        raise UnsupportedModelError(_refusal(str(origin), kind, f"format={kind!r}"))
    return config | {"quant_method": method}


def refuse_by_names(names: Iterable[str], origin: str) -> None:
    """UnsupportedModelError when a tensor's name tells that another tool quantized the model."""
    for name in names:
        for ending, method in _ENDINGS.items():
            if name.endswith(ending):
                raise UnsupportedModelError(_refusal(origin, method, f"it holds {name!r}"))
        if name.endswith(".qweight"):
            raise UnsupportedModelError(
                f"{origin}: {name!r} is of a GPTQ or AWQ checkpoint, and neither quantization_config in config.json nor "
                f'{OLD_GPTQ} describes it: for GPTQ write {{"bits": ..., "group_size": ..., "desc_act": ..., "sym": ...}} there'
            )


def _refusal(origin: str, method: str, sign: str) -> str:
    return (
        f"{origin}: the weights are quantized by {NAMES.get(method, shown(method))}, as {sign} says, which is not read "
        f"({' and '.join(READ)} are): take the model it was made from, in bf16, fp16 or fp32, and let halve quantize that"
    )


def gptq_file(folder: Path, config: dict[str, Any]) -> list[Path] | None:
    """The file of an old GPTQ folder, which goes by a name of its own; None when the usual names are there.

    Raises CheckpointError when none or several could be meant.
    """
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return None
    base = config.get("model_file_base_name")
    files = sorted(folder.glob("*.safetensors"))
    named = [file for file in files if file.stem == base]
    if len(named or files) == 1:
        return named or files
    found = ", ".join(file.name for file in files or sorted([*folder.glob("*.pt"), *folder.glob("*.bin")])) or "none"
    raise CheckpointError(
        f"{folder}: one .safetensors file of a GPTQ model is wanted and there are: {found}: "
        f"leave the one that is meant, or name it in model_file_base_name of {OLD_GPTQ}"
    )
