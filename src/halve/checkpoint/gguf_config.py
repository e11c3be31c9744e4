"""What a GGUF file says of its model, as a Hugging Face config, and the names of its tensors there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.checkpoint.gguf_header import GgufHeader
from halve.errors import CheckpointError, UnsupportedModelError, shown
from halve.model.families import FAMILIES
from halve.model.fields import MAX_LAYERS
from halve.model.rotary import RopeConfig, rope_frequencies
from halve.model.wrappers import ALIASES

Json = dict[str, Any]

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1 and later divide their rotary frequencies by
_ROLES = {
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_OUTPUT_NORMS = {"post_attention_norm": "attn_output_norm", "post_ffw_norm": "mlp_output_norm"}
_TOP = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
_MEANINGLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")  # fields that say nothing of the maths


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` maps onto a Hugging Face `model_type`.

    own: fields of its config beside the common ones; roles: names of tensors in a block by role; merged: those of tensors
    that hold several of them; permuted: rows of q and k are stored in the order of neighbouring pairs.
    """

    model_type: str
    class_name: str
    own: Callable[[GgufFields, Json], Json] | None = None
    roles: dict[str, str] = field(default_factory=lambda: _ROLES)
    merged: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    needs_rope_base: bool = False


class GgufFields:
    """The fields `<architecture>.*` of a header; each is checked as it is read, and what is not read is refused."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header, self.prefix = header, f"{architecture}."
        self._read: set[str] = set()

    def fail(self, key: str, why: str) -> UnsupportedModelError:
        value = self.header.fields.get(self.prefix + key)
        what = f"{self.prefix}{key} is missing and" if value is None else f"{self.prefix}{key}={shown(value)}"
        return UnsupportedModelError(f"{self.header.path}: {what} {why}: take the model's Hugging Face folder")

    def get(self, key: str) -> Any:
        self._read.add(self.prefix + key)
        value = self.header.fields.get(self.prefix + key)
        if isinstance(value, tuple) and value and all(one == value[0] for one in value):
            return value[0]  # of each layer the same
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise self.fail(key, "must be one whole number, the same for all layers")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, float) or not abs(value) <= 1e30:  # neither true of NaN
            raise self.fail(key, "must be a decimal number of at most 1e30")
        return float(str(np.float32(value)))  # as it was written before it was stored in 32 bits

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a field that is there with another value than these."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise self.fail(key, "changes what is computed and is not handled")

    def refuse_unread(self) -> None:
        known = self._read | {self.prefix + key for key in _MEANINGLESS}
        for key in self.header.fields:
            if key.startswith(self.prefix) and key not in known:
                raise UnsupportedModelError(
                    f"{self.header.path}: field {shown(key)} is not known for this architecture and may change what is "
                    "computed: take the model's Hugging Face folder"
                )


def _gemma(fields: GgufFields, config: Json, period: int, largest: int) -> Json:
    """What Gemma 2 and 3 share. The largest of each, by its layers, scales scores by another size than that of a head."""
    layers = config["num_hidden_layers"]
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) == layers and all(isinstance(one, bool) for one in pattern):
        sliding = pattern
    elif isinstance(pattern, bool):
        sliding = [pattern] * layers
    elif pattern is None or (isinstance(pattern, int) and pattern > 0):
        sliding = [(layer + 1) % (pattern or period) != 0 for layer in range(layers)]
    else:
        raise fields.fail("attention.sliding_window_pattern", "must be a period, or true or false for each layer")
    by_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": by_head if layers == largest else config["head_dim"],
        "sliding_window": fields.whole("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
    }


def _gemma2(fields: GgufFields, config: Json) -> Json:
    return _gemma(fields, config, period=2, largest=46) | {
        "attn_logit_softcapping": fields.decimal("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.decimal("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: GgufFields, config: Json) -> Json:
    cap = fields.get("final_logit_softcapping")
    local = {"rope_type": "default", "rope_theta": fields.decimal("rope.freq_base_swa", 10000.0)}
    return _gemma(fields, config, period=6, largest=62) | {
        "final_logit_softcapping": None if cap is None else fields.decimal("final_logit_softcapping"),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(fields: GgufFields, config: Json) -> Json:
    original = fields.get("rope.scaling.original_context_length")
    if original not in (None, config["max_position_embeddings"]):
        raise fields.fail("rope.scaling.original_context_length", "names frequencies that change with a text's length")
    fields.only("rope.scaling.attn_factor", 1.0)
    return {"sliding_window": fields.whole("attention.sliding_window", 0) or None}


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, _ROLES | _OUTPUT_NORMS),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, _ROLES | _OUTPUT_NORMS, needs_rope_base=True),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _phi3,
        merged={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
}


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
    kind = architecture.model_type
    family = FAMILIES[ALIASES[kind].other if kind in ALIASES else kind]
    theirs = {ours: family.names[role] for ours, role in architecture.roles.items() if role in family.names}
    names: dict[str, str] = {}
    numbers = {str(layer) for layer in range(layers)}
    for stored in header.tensors:
        stem, _, part = stored.rpartition(".")
        if stored == ROPE_FACTORS:
            continue
        block = stem.split(".", 2)
        if stem in _TOP:
            own = family.names[_TOP[stem]]
        elif len(block) == 3 and block[0] == "blk" and block[1] in numbers:
            own = (theirs | architecture.merged).get(block[2])
            own = own and f"{family.names['block'].format(int(block[1]))}.{own}"
        else:
            own = None
        if own is None or part not in ("weight", "bias"):
            raise CheckpointError(
                f"{header.path}: unexpected tensor {shown(stored)}: its fields do not describe this model, take its "
                "Hugging Face folder"
            )
        names[f"{own}.{part}"] = stored
    return names


def hf_config(header: GgufHeader, read: Callable[[str], Tensor]) -> Json:
    """config.json of the model in a GGUF file, without a dtype; `read` gives a tensor by its name in the file.

    Raises UnsupportedModelError for a field that would change the maths and is not handled.
    """
    name, architecture = architecture_of(header)
    fields, tensors = GgufFields(header, name), header.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing: give a whole model's file")
    heads, hidden = fields.whole("attention.head_count"), fields.whole("embedding_length")
    layers = fields.whole("block_count")
    if not 1 <= heads <= hidden:
        raise fields.fail("attention.head_count", f"must be from 1 to embedding_length={hidden}")
    if not 1 <= layers <= MAX_LAYERS:
        raise fields.fail("block_count", f"must be from 1 to {MAX_LAYERS:,}")
    head_dim = fields.whole("attention.key_length", fields.whole("rope.dimension_count", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        fields.only(key, head_dim)
    for key in ("expert_count", "expert_used_count"):
        fields.only(key, 0)
    fields.only("attention.causal", True)
    config: Json = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.decimal("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(fields, architecture),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    config |= {key: tensor in tensors for key, tensor in biases.items() if key in _bias_fields(architecture)}
    config |= architecture.own(fields, config) if architecture.own else {}
    if ROPE_FACTORS in tensors:
        config["rope_parameters"] = _llama3_rope(header, config, read)
    fields.refuse_unread()
    return config | token_ids(header, config["vocab_size"])


def _bias_fields(architecture: Architecture) -> frozenset[str]:
    family = FAMILIES.get(architecture.model_type)
    return frozenset() if family is None else family.bias_fields


def _rope(fields: GgufFields, architecture: Architecture) -> Json:
    base = fields.decimal("rope.freq_base", None if architecture.needs_rope_base else 10000.0)
    kind = fields.get("rope.scaling.type")
    fields.only("rope.scale_linear", 1.0)
    if kind in (None, "none"):
        fields.only("rope.scaling.factor", 0.0, 1.0)
        return {"rope_type": "default", "rope_theta": base}
    if kind != "linear":
        raise fields.fail("rope.scaling.type", "is a rotary type that is not converted")
    return {"rope_type": "linear", "rope_theta": base, "factor": fields.decimal("rope.scaling.factor")}


def _llama3_rope(header: GgufHeader, config: Json, read: Callable[[str], Tensor]) -> Json:
    """The parameters of the frequency bands of Llama 3.1 and later, which the file holds as their result alone."""
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    if rope.get("rope_type") == "default" and header.tensors[ROPE_FACTORS].shape == (head_dim / 2,):
        factors = read(ROPE_FACTORS)
        plain, _ = rope_frequencies(RopeConfig(rope["rope_theta"]), head_dim, 0)
        numbers = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        numbers["original_max_position_embeddings"] = 8192
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
    for name in ("bos", "eos", "padding", "unknown", "eot"):
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = token = header.fields.get(key)
        if token is not None and not (type(token) is int and 0 <= token < vocab_size):
            raise CheckpointError(
                f"{header.path}: {key}={shown(token)} is no token of a vocabulary of {vocab_size:,}: get an intact copy"
            )
    ends = [token for token in dict.fromkeys((ids["eos"], ids["eot"])) if token is not None]
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}
