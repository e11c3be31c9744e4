"""How the architectures of GGUF name what a model is: one table, by which files are read and written.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what else an architecture reads is as in
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halve.checkpoint.gguf_header import GgufHeader
from halve.errors import UnsupportedModelError, shown
from halve.model.config import ModelConfig
from halve.model.families import FAMILIES
from halve.model.family import Family
from halve.model.wrappers import ALIASES

Json = dict[str, Any]

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1 and later divide their rotary frequencies by
# what longrope divides them by: in short texts, and in those beyond the length it was trained on
SPREADS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
TOKEN_EMBEDDING, OUTPUT = "token_embd", "output"
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
_TOP = {TOKEN_EMBEDDING: "embed", "output_norm": "final_norm", OUTPUT: "head"}
_MEANINGLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")  # fields that say nothing of the maths


@dataclass(frozen=True)
class Number:
    """A number of a model: its key in a GGUF file, its field in a config.json, and that of a ModelConfig or LayerConfig."""

    key: str
    theirs: str
    ours: str


SIZES = (
    Number("context_length", "max_position_embeddings", "max_positions"),
    Number("embedding_length", "hidden_size", "hidden_size"),
)
WIDTHS = (  # of each layer; a file has one number where they are all the same
    Number("attention.head_count", "num_attention_heads", "num_heads"),
    Number("attention.head_count_kv", "num_key_value_heads", "num_kv_heads"),
    Number("feed_forward_length", "intermediate_size", "intermediate_size"),
)
EPSILON = Number("attention.layer_norm_rms_epsilon", "rms_norm_eps", "norm_eps")
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all of one size here


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` maps onto a Hugging Face `model_type`.

    read, write: what it says beside the common fields, as fields of a config and back; roles: names of tensors in a block
    by role; merged: those of tensors that hold several of them; permuted: rows of q and k are stored in the order of
    neighbouring pairs.

    What is written of it, as far as llama.cpp reads it: written: the families; by_layer: layers may have widths of their
    own; biases: the fields of a ModelConfig that say which linears may have one; square: heads are together as wide as the
    model.
    """

    model_type: str
    class_name: str
    read: Callable[[GgufFields, Json], Json] | None = None
    write: Callable[[ModelConfig], Json] | None = None
    roles: dict[str, str] = field(default_factory=lambda: _ROLES)
    merged: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    needs_rope_base: bool = False
    partial: bool = False  # rotary embedding may turn a part of each head, and be a longrope
    written: tuple[str, ...] = ()
    by_layer: bool = False
    biases: tuple[str, ...] = ()
    square: bool = False

    @property
    def family(self) -> Family:
        kind = self.model_type
        return FAMILIES[ALIASES[kind].other if kind in ALIASES else kind]

    def stems(self, layers: int) -> dict[str, str]:
        """Name in a GGUF file -> Hugging Face's, without what follows the last point, of all tensors that it may have."""
        names = self.family.names
        stems = {ours: names[role] for ours, role in _TOP.items()}
        inside = {ours: names[role] for ours, role in self.roles.items() if role in names} | self.merged
        for layer in range(layers):
            block = names["block"].format(layer)
            stems |= {f"blk.{layer}.{ours}": f"{block}.{theirs}" for ours, theirs in inside.items()}
        return stems

    def in_pairs(self, stored: str) -> bool:
        """Whether rows of this tensor are stored in the order of neighbouring pairs."""
        return self.permuted and (".attn_q." in stored or ".attn_k." in stored)

    def offset(self, stored: str) -> float:
        """What this tensor holds more than Hugging Face's."""
        return self.family.norm_offset if stored.endswith("norm.weight") else 0.0


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

    def by_layer(self, key: str, layers: int, default: list[int] | None = None) -> list[int]:
        """A whole number for each layer, from a list of them or from one for all."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, tuple):
            return [self.whole(key)] * layers
        if len(value) != layers or not all(type(one) is int for one in value):
            raise self.fail(key, f"must be a whole number, or one for each of {layers} layers")
        return list(value)

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


_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_LOCAL_BASE = "rope.freq_base_swa"
_PERIODS = {"gemma2": 2, "gemma3": 6}  # every so many layers one has full attention, where a file does not say


def _slides(period: int, layers: int) -> list[bool]:
    """Which layers have a window."""
    return [(layer + 1) % period != 0 for layer in range(layers)]


def _read_gemma(fields: GgufFields, config: Json, largest: int) -> Json:
    """What Gemma 2 and 3 share. The largest of each, by its layers, scales scores by another size than that of a head."""
    layers = config["num_hidden_layers"]
    pattern = fields.get(_PATTERN)
    if isinstance(pattern, tuple) and len(pattern) == layers and all(isinstance(one, bool) for one in pattern):
        sliding = list(pattern)
    elif isinstance(pattern, bool):
        sliding = [pattern] * layers
    elif pattern is None or (isinstance(pattern, int) and pattern > 0):
        sliding = _slides(pattern or _PERIODS[fields.prefix.rstrip(".")], layers)
    else:
        raise fields.fail(_PATTERN, "must be a period, or true or false for each layer")
    by_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": by_head if layers == largest else config["head_dim"],
        "sliding_window": fields.whole(_WINDOW),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
    }


def _write_gemma(config: ModelConfig, architecture: str) -> Json:
    windows = [layer.sliding_window for layer in config.layers]
    sliding = [window is not None for window in windows]
    fields: Json = {_WINDOW: next((window for window in windows if window), config.max_positions)}
    count, usual = len(windows), _PERIODS[architecture]
    if sliding != _slides(usual, count):
        # a period where one says it: older programs read no lists
        periods = (period for period in range(1, count + 2) if sliding == _slides(period, count))
        fields[_PATTERN] = next(periods, tuple(sliding))
    return fields


def _read_gemma2(fields: GgufFields, config: Json) -> Json:
    return _read_gemma(fields, config, largest=46) | {
        "attn_logit_softcapping": fields.decimal(_ATTENTION_CAP, 50.0),
        "final_logit_softcapping": fields.decimal(_LOGIT_CAP, 30.0),
    }


def _write_gemma2(config: ModelConfig) -> Json:
    caps = {_ATTENTION_CAP: config.attention_cap, _LOGIT_CAP: config.logit_cap}
    return _write_gemma(config, "gemma2") | {key: cap for key, cap in caps.items() if cap is not None}


def _read_gemma3(fields: GgufFields, config: Json) -> Json:
    cap = fields.get(_LOGIT_CAP)
    local = {"rope_type": "default", "rope_theta": fields.decimal(_LOCAL_BASE, 10000.0)}
    return _read_gemma(fields, config, largest=62) | {
        "final_logit_softcapping": None if cap is None else fields.decimal(_LOGIT_CAP),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _write_gemma3(config: ModelConfig) -> Json:
    cap = {} if config.logit_cap is None else {_LOGIT_CAP: config.logit_cap}
    return _write_gemma(config, "gemma3") | {_LOCAL_BASE: config.ropes[1].theta} | cap


def _read_phi3(fields: GgufFields, config: Json) -> Json:
    rope = config["rope_parameters"]
    turned = fields.whole(HEAD_SIZES[2], config["head_dim"])
    if not 0 < turned <= config["head_dim"]:
        raise fields.fail(HEAD_SIZES[2], f"must be from 1 to the {config['head_dim']} channels of a head")
    rope |= {"partial_rotary_factor": turned / config["head_dim"]} if turned < config["head_dim"] else {}
    key, window = "rope.scaling.original_context_length", {"sliding_window": fields.whole(_WINDOW, 0) or None}
    if not any(name in fields.header.tensors for name in SPREADS.values()):
        fields.only(key, config["max_position_embeddings"])
        fields.only("rope.scaling.attn_factor", 1.0)
        return window
    rope |= {"rope_type": "longrope", "attention_factor": fields.decimal("rope.scaling.attn_factor", 1.0)}
    return window | {"original_max_position_embeddings": fields.whole(key, config["max_position_embeddings"])}


# of Granite: fields of a GGUF file, of a config.json, and of a ModelConfig
_SCALES = (
    Number("embedding_scale", "embedding_multiplier", "embed_scale"),
    Number("residual_scale", "residual_multiplier", "residual_scale"),
    Number("logit_scale", "logits_scaling", "logit_divisor"),
    Number("attention.scale", "attention_multiplier", "attention_scale"),
)


def _read_granite(fields: GgufFields, config: Json) -> Json:
    fields.only("rope.scaling.finetuned", True)  # which llama.cpp takes for whether there is a rotary embedding at all
    usual = {"attention.scale": config["head_dim"] ** -0.5}
    return {number.theirs: fields.decimal(number.key, usual.get(number.key, 1.0)) for number in _SCALES}


def _write_granite(config: ModelConfig) -> Json:
    return {number.key: getattr(config, number.ours) for number in _SCALES}


def _read_smollm3(fields: GgufFields, config: Json) -> Json:
    return {"no_rope_layer_interval": 4}  # llama.cpp knows no other


_ALL_BIASES = ("qkv_bias", "o_bias", "mlp_bias")
_LLAMAS = ("llama", "mistral", "ministral")
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, written=_LLAMAS, biases=_ALL_BIASES),
    "deci": Architecture(
        "llama", "LlamaForCausalLM", permuted=True, written=_LLAMAS, biases=_ALL_BIASES, by_layer=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", written=("qwen2",), biases=("qkv_bias",), square=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", written=("qwen3",)),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", _read_granite, _write_granite, permuted=True, written=("granite",), square=True
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _read_smollm3, permuted=True, written=("smollm3",)),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", roles=_ROLES | _OUTPUT_NORMS, written=("olmo2",), square=True),
    "gemma": Architecture("gemma", "GemmaForCausalLM", written=("gemma",)),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, _ROLES | _OUTPUT_NORMS, written=("gemma2",)
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _read_gemma3,
        _write_gemma3,
        _ROLES | _OUTPUT_NORMS,
        needs_rope_base=True,
        written=("gemma3_text",),
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _read_phi3,
        partial=True,
        merged={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
}
