"""What a GGUF file says of its model, as a Hugging Face config, and the fields that say the same of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.config import with_layers
from halve.checkpoint.gguf_architecture import (
    ARCHITECTURES,
    EPSILON,
    HEAD_SIZES,
    OUTPUT,
    ROPE_FACTORS,
    SIZES,
    SPREADS,
    TOKEN_EMBEDDING,
    WIDTHS,
    Architecture,
    GgufFields,
)
from halve.checkpoint.gguf_header import GgufHeader
from halve.errors import CheckpointError, UnsupportedModelError, shown
from halve.model.config import ModelConfig
from halve.model.fields import MAX_LAYERS
from halve.model.rotary import RopeConfig, rope_frequencies

Json = dict[str, Any]

_ROPE_BASE, _ROPE_TYPE, _ROPE_FACTOR = "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"
# of Llama 3.1 and later: the factors that a file holds do not tell these apart
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# ids of tokens that end a generation: of a text, a turn, a message
_ENDS = ("eos", "eot", "eom")


def architecture_of(header: GgufHeader) -> tuple[str, Architecture]:
    """The architecture of a file, by name. Raises UnsupportedModelError for one that is not converted, or part of a model."""
    fields, path = header.fields, header.path
    name, kind = fields.get("general.architecture"), fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{path}: general.type={shown(kind)} is no model of its own: give the model's file")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: general.architecture={shown(name)} is not converted: take a GGUF of {', '.join(ARCHITECTURES)}, or the "
            "model's Hugging Face folder"
        )
    if fields.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path}: is one of {shown(fields['split.count'])} parts: join them first (llama-gguf-split --merge)"
        )
    return name, ARCHITECTURES[name]


def tensor_names(header: GgufHeader, layers: int) -> dict[str, str]:
    """Hugging Face name -> name in the file. Raises CheckpointError for a tensor that the architecture does not have."""
    _, architecture = architecture_of(header)
    stems = architecture.stems(layers)
    names: dict[str, str] = {}
    for stored in header.tensors:
        stem, _, part = stored.rpartition(".")
        if stored == ROPE_FACTORS or (architecture.partial and stored in SPREADS.values()):
            continue
        if stem not in stems or part not in ("weight", "bias"):
            raise CheckpointError(
                f"{header.path}: unexpected tensor {shown(stored)}: its fields do not describe this model, take its "
                "Hugging Face folder"
            )
        names[f"{stems[stem]}.{part}"] = stored
    return names


def hf_config(header: GgufHeader, read: Callable[[str], Tensor]) -> Json:
    """config.json of the model in a GGUF file, without a dtype; `read` gives a tensor by its name in the file.

    Raises UnsupportedModelError for a field that would change the maths and is not handled.
    """
    name, architecture = architecture_of(header)
    fields, tensors = GgufFields(header, name), header.tensors
    if f"{TOKEN_EMBEDDING}.weight" not in tensors:
        raise CheckpointError(f"{header.path}: tensor '{TOKEN_EMBEDDING}.weight' is missing: give a whole model's file")
    layers, hidden = fields.whole("block_count"), fields.whole("embedding_length")
    if not 1 <= layers <= MAX_LAYERS:
        raise fields.fail("block_count", f"must be from 1 to {MAX_LAYERS:,}")
    widths = _widths(fields, architecture, layers)
    of_all = max(zip(*widths.values(), strict=True))  # a layer with the most heads
    heads = of_all[0]
    if not 1 <= heads <= hidden:
        raise fields.fail("attention.head_count", f"must be from 1 to embedding_length={hidden}")
    key_length, value_length, rotated = HEAD_SIZES
    head_dim = fields.whole(
        key_length, hidden // heads if architecture.partial else fields.whole(rotated, hidden // heads)
    )
    for key in (value_length,) if architecture.partial else (value_length, rotated):
        fields.only(key, head_dim)
    for key in ("expert_count", "expert_used_count"):
        fields.only(key, 0)
    fields.only("attention.causal", True)
    config: Json = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": tensors[f"{TOKEN_EMBEDDING}.weight"].shape[0],
        **{number.theirs: fields.whole(number.key) for number in SIZES},
        "num_hidden_layers": layers,
        **dict(zip(widths, of_all, strict=True)),
        "head_dim": head_dim,
        EPSILON.theirs: fields.decimal(EPSILON.key),
        "rope_parameters": _read_rope(fields, architecture),
        "tie_word_embeddings": f"{OUTPUT}.weight" not in tensors,
    }
    biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    config |= {key: tensor in tensors for key, tensor in biases.items() if key in architecture.family.bias_fields}
    config |= architecture.read(fields, config) if architecture.read else {}
    if any(len(set(sizes)) > 1 for sizes in widths.values()):
        rows = [{number.ours: widths[number.theirs][layer] for number in WIDTHS} for layer in range(layers)]
        config |= with_layers(config, rows)
    if config["rope_parameters"].get("rope_type") == "longrope":
        config["rope_parameters"] |= {key: _spread(header, tensor, read) for key, tensor in SPREADS.items()}
    if ROPE_FACTORS in tensors:
        config["rope_parameters"] = _llama3_rope(header, config, read)
    fields.refuse_unread()
    return config | token_ids(header, config["vocab_size"])


def _widths(fields: GgufFields, architecture: Architecture, layers: int) -> dict[str, list[int]]:
    """The widths of each layer, by their fields in a config."""
    widths: dict[str, list[int]] = {}
    for number in WIDTHS:
        default = widths["num_attention_heads"] if number.ours == "num_kv_heads" else None
        widths[number.theirs] = sizes = fields.by_layer(number.key, layers, default)
        if len(set(sizes)) > 1 and not architecture.by_layer:
            raise fields.fail(number.key, "must be one whole number, the same for all layers")
    return widths


def gguf_fields(name: str, config: ModelConfig) -> Json:
    """The fields of a GGUF file of architecture `name` that say what `config` does, which `hf_config` reads.

    What has no field there is not said: whoever writes them reads them back and compares.
    """
    architecture, layers = ARCHITECTURES[name], config.layers
    fields: Json = {"block_count": len(layers)}
    fields |= {number.key: getattr(config, number.ours) for number in (*SIZES, EPSILON)}
    fields |= dict.fromkeys(HEAD_SIZES, config.head_dim)
    for number in WIDTHS:
        sizes = [getattr(layer, number.ours) for layer in layers]
        fields[number.key] = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
    fields |= _write_rope(config.ropes[0]) if config.ropes else {}
    fields |= architecture.write(config) if architecture.write else {}
    fields |= {"vocab_size": config.vocab_size}
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in fields.items()}


def _read_rope(fields: GgufFields, architecture: Architecture) -> Json:
    base = fields.decimal(_ROPE_BASE, None if architecture.needs_rope_base else 10000.0)
    kind = fields.get(_ROPE_TYPE)
    fields.only("rope.scale_linear", 1.0)
    if kind in (None, "none"):
        fields.only(_ROPE_FACTOR, 0.0, 1.0)
        return {"rope_type": "default", "rope_theta": base}
    if kind != "linear":
        raise fields.fail(_ROPE_TYPE, "is a rotary type that is not converted")
    return {"rope_type": "linear", "rope_theta": base, "factor": fields.decimal(_ROPE_FACTOR)}


def _write_rope(rope: RopeConfig) -> Json:
    scaling = {_ROPE_TYPE: "linear", _ROPE_FACTOR: rope.options["factor"]} if rope.kind == "linear" else {}
    return {_ROPE_BASE: rope.theta} | scaling


def rope_factors(config: ModelConfig) -> Tensor | None:
    """What the frequencies of Llama 3.1 and later are divided by, float32 [head size / 2], None for other models.

    Raises UnsupportedModelError for bands that would not be found again from them.
    """
    rope = config.ropes[0] if config.ropes else None
    if rope is None or rope.kind != "llama3":
        return None
    other = {key: rope.options[key] for key, value in _LLAMA3.items() if rope.options[key] != value}
    if other:
        key, value = next(iter(other.items()))
        raise UnsupportedModelError(
            f"rope type llama3 with {key}={value}, and a GGUF file tells of {_LLAMA3[key]} alone"
        )
    plain, _ = rope_frequencies(RopeConfig(rope.theta), config.head_dim, 0)
    bands, _ = rope_frequencies(rope, config.head_dim, 0)
    return plain / bands


def _spread(header: GgufHeader, name: str, read: Callable[[str], Tensor]) -> list[float]:
    """The numbers of a tensor, as they were written before they were stored in 32 bits."""
    if name not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor {name!r} is missing: get an intact copy")
    return [float(str(number)) for number in read(name).flatten().numpy()]


def _llama3_rope(header: GgufHeader, config: Json, read: Callable[[str], Tensor]) -> Json:
    """The parameters of the frequency bands of Llama 3.1 and later, which the file holds as their result alone."""
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    if rope.get("rope_type") == "default" and header.tensors[ROPE_FACTORS].shape == (head_dim / 2,):
        factors = read(ROPE_FACTORS)
        plain, _ = rope_frequencies(RopeConfig(rope["rope_theta"]), head_dim, 0)
        numbers = {"factor": float(factors.max()), **_LLAMA3}
        bands, _ = rope_frequencies(RopeConfig(rope["rope_theta"], "llama3", numbers), head_dim, 0)
        if numbers["factor"] >= 1 and torch.allclose(plain / factors, bands, rtol=1e-4, atol=0):
            return rope | {"rope_type": "llama3"} | numbers
    raise UnsupportedModelError(
        f"{header.path}: tensor {ROPE_FACTORS!r} changes rotary frequencies in another way than Llama 3.1 does: take the "
        "model's Hugging Face folder"
    )


def token_ids(header: GgufHeader, vocab_size: int) -> Json:
    """The ids of special tokens as a config has them; a token that ends a turn ends a generation as well."""
    ids: dict[str, int | None] = {}
    for name in ("bos", "padding", "unknown", *_ENDS):
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = token = header.fields.get(key)
        if token is not None and not (type(token) is int and 0 <= token < vocab_size):
            raise CheckpointError(
                f"{header.path}: {key}={shown(token)} is no token of a vocabulary of {vocab_size:,}: get an intact copy"
            )
    ends = [token for token in dict.fromkeys(ids[name] for name in _ENDS) if token is not None]
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}
