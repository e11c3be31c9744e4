"""config.json of a compressed model; `halve.model.families.parse_config` reads what is written here."""

from __future__ import annotations

import torch

from halve.model.config import ModelConfig
from halve.model.families import HALVE_LAYER, Family
from halve.model.layer_rules import PATTERNS, no_windows, rope_by_list, windows_by_layer


def with_dtype(raw: dict, dtype: torch.dtype) -> dict:
    """The config with the dtype its model is to run in, in every field that says so."""
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]
    return raw | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


def with_layers(raw: dict, rows: list[dict]) -> dict:
    """What a config says more, or else, where its layers have the widths that `rows` spell out."""
    own = {"model_type": "halve", "halve_model_type": raw["model_type"], "halve_layers": rows}
    return own | {"architectures": ["HalveForCausalLM"]}


def config_json(
    raw: dict, family: Family, config: ModelConfig, plain: bool, schemes_json: dict | None, dtype: torch.dtype | None
) -> dict:
    """config.json of the compressed model; `model_type` stays only if the stock architecture can hold it (`plain`)."""
    out = {k: v for k, v in raw.items() if k not in ("halve_layers", "halve_model_type", "quantization_config")}
    base = raw.get("halve_model_type") or raw["model_type"]
    layers = config.layers
    out["model_type"] = base
    out["tie_word_embeddings"] = config.tied
    out["num_hidden_layers"] = len(layers)
    # what the model does not read the common code of transformers may: its cache, and its checks
    unread = ["attention_chunk_size"]
    unread += ["sliding_window", "layer_types"] if family.windows is no_windows else []
    unread += ["rope_parameters", "rope_scaling"] if not config.ropes else []
    out = {key: value for key, value in out.items() if key not in unread}
    by_layer = family.windows in PATTERNS or (family.windows is windows_by_layer and raw.get("use_sliding_window"))
    if by_layer or "layer_types" in out:
        # also where a rule held that counts layers, for some may be gone
        out["layer_types"] = ["sliding_attention" if layer.sliding_window else "full_attention" for layer in layers]
    if family.ropes is rope_by_list:
        out["no_rope_layers"] = [int(layer.rope is not None) for layer in layers]
    if dtype is not None:
        out = with_dtype(out, dtype)
    if schemes_json:
        out["quantization_config"] = schemes_json
    if not plain:
        return out | with_layers(out, [{name: getattr(layer, name) for name in HALVE_LAYER} for layer in layers])
    for ours, theirs in family.width_fields.items():
        value = config.head_dim if ours == "head_dim" else getattr(layers[0], ours)
        if ours != "head_dim" or raw.get("head_dim") is not None or value * layers[0].num_heads != config.hidden_size:
            out[theirs] = value
    return out
