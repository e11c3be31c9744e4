"""GGUF files for tests: those of small Hugging Face models, written by the gguf package, and headers written byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from halve.checkpoint.tensors import read_json

U32, F32, TEXT, ARRAY = 4, 6, 8, 9


def write_gguf(
    folder: Path, path: Path, kind: str = "F32", fields: dict[str, Any] | None = None, spread: np.ndarray | None = None
) -> Path:
    """The model of a Hugging Face folder as a GGUF file whose matrices are of type `kind`; `spread`: rotary factors."""
    config = read_json(folder / "config.json")
    name = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if name.startswith("gemma") and "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        scale, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
        writer.add_rope_scaling_attn_factors((1 + np.log(scale / original) / np.log(original)) ** 0.5)
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        for kind_of in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind_of}.weight", np.array(rope[f"{kind_of}_factor"], np.float32))
    if name == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    for key, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    if spread is not None:
        writer.add_tensor("rope_freqs.weight", spread)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name), config["num_hidden_layers"]
    )
    for key, tensor in load_file(folder / "model.safetensors").items():
        stem, part = key.rsplit(".", 1)
        values = tensor.float().numpy()
        if name in ("llama", "granite", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            count = heads if stem.endswith("q_proj") else kv_heads
            values = values.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if name.startswith("gemma") and stem.endswith("norm"):
            values = values + 1
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(values, stored)
        own = names.get_name(stem)
        assert own is not None, stem
        writer.add_tensor(f"{own}.{part}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """One tensor of a header; `dims`: fastest first, as a file has them."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these fields and tensors; `counts`: of tensors and fields, where they are not told as they are."""
    head = (
        b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields)))) + b"".join([*fields, *tensors])
    )
    return head + b"\0" * (-len(head) % 32) + data
