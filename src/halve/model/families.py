"""Hugging Face configs and weight names <-> the decoder. A new family is one entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from halve.errors import UnsupportedModelError
from halve.model.decoder import ACTIVATIONS, LayerConfig, ModelConfig
from halve.model.rotary import RopeConfig

Json = dict[str, Any]

# Fields of a config.json that do not change what the decoder computes.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range init_std
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id prefix
    attention_dropout dropout activation_dropout layerdrop hidden_dropout resid_pdrop
    pretraining_tp output_attentions output_hidden_states return_dict torchscript gradient_checkpointing
    quantization_config is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward id2label label2id
    problem_type finetuning_task task_specific_params tokenizer_class cross_attention_hidden_size forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens min_length max_length do_sample temperature top_k top_p
    num_beams num_beam_groups repetition_penalty length_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values exponential_decay_length_penalty diversity_penalty typical_p tie_encoder_decoder
    pruned_heads use_bfloat16 tf_legacy_loss is_llama_config rope_interleaved transformers.js_config
    halve_model_type halve_layers model_name name unsloth_version unsloth_fixed""".split()
)

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ROPE_NEEDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


class Fields:
    """A config.json that remembers which fields were read, so that the rest can be refused rather than ignored."""

    def __init__(self, raw: Json, origin: str) -> None:
        self.raw, self.origin = raw, origin
        self.read: set[str] = set()

    def fail(self, key: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.origin}: {key}={self.raw.get(key)!r} {why}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.optional(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def optional(self, key: str, default: Any = None) -> Any:
        """The value; `default` where the field is missing or null."""
        self.read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def activation(self, key: str, default: str) -> str:
        value = self.optional(key, default)
        if value not in ACTIVATIONS:
            raise self.fail(key, f"is not an activation this decoder computes ({', '.join(ACTIVATIONS)})")
        return value

    def refuse_unread(self) -> None:
        """Any other field may change the maths: refused unless it is harmless or switched off."""
        for key, value in self.raw.items():
            if key in self.read or key in HARMLESS or key.startswith("_") or value is None or value is False:
                continue
            raise self.fail(
                key, "is not a field this decoder handles: delete it from config.json if it does not change the maths"
            )


def _rope(f: Fields) -> RopeConfig:
    """Rotary parameters, in the older (`rope_theta`, `rope_scaling`) and the newer (`rope_parameters`) spelling."""
    theta = f.number("rope_theta", 10000.0)
    f.read |= {"rope_parameters", "rope_scaling"}
    options = dict(f.raw.get("rope_parameters") or f.raw.get("rope_scaling") or {})
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    where = "rope_parameters" if f.raw.get("rope_parameters") else "rope_scaling"
    theta = float(options.pop("rope_theta", None) or theta)
    if kind not in ROPE_KINDS:
        raise f.fail(where, f"has rotary type {kind!r}: this decoder computes {', '.join(ROPE_KINDS)}")
    partial = options.pop("partial_rotary_factor", None)
    if partial not in (None, 1, 1.0) or f.optional("partial_rotary_factor", 1.0) != 1.0:
        raise f.fail("partial_rotary_factor" if partial is None else where, "rotates part of a head: not handled")
    missing = [k for k in ROPE_NEEDS.get(kind, ()) if not isinstance(options.get(k), int | float)]
    if missing:
        raise f.fail(where, f"lacks the number {missing[0]!r} that rotary type {kind!r} needs")
    if kind == "default":
        options = {}
    return RopeConfig(theta, kind, options)


def _heads(f: Fields, family: str) -> tuple[int, int, int]:
    heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", 8 if family == "mistral" else heads)
    if heads % kv_heads:
        raise f.fail("num_key_value_heads", f"does not divide num_attention_heads={heads}")
    hidden = f.integer("hidden_size")
    head_dim = f.integer("head_dim", 128 if family == "qwen3" else hidden // heads)
    if f.raw.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}, and head_dim is not given")
    return heads, kv_heads, head_dim


def _windows(f: Fields, layers: int, family: str) -> list[int | None]:
    """Sliding window of each layer, by each family's own rule (None: full attention)."""
    if family == "llama":
        if f.optional("sliding_window") is not None:
            raise f.fail("sliding_window", "is not part of this architecture")
        return [None] * layers
    if family == "mistral":
        # the field missing means the class default, 4096; null means none
        window = f.raw.get("sliding_window", 4096)
        f.read |= {"sliding_window", "layer_types"}
        return [window] * layers
    window = f.optional("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
    f.read.add("sliding_window")
    first = f.optional("max_window_layers", 28)
    kinds = f.optional("layer_types")
    if kinds is None:
        return [window if window is not None and i >= first else None for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise f.fail("layer_types", f"must name full_attention or sliding_attention for each of {layers} layers")
    if "sliding_attention" in kinds and window is None:
        raise f.fail("layer_types", "names sliding_attention, but use_sliding_window is not true")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _llama_like(f: Fields, family: str) -> ModelConfig:
    heads, kv_heads, head_dim = _heads(f, family)
    layers, width = f.integer("num_hidden_layers"), f.integer("intermediate_size")
    bias = f.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        head_dim=head_dim,
        max_positions=f.integer("max_position_embeddings", 2048),
        layers=tuple(LayerConfig(heads, kv_heads, width, w) for w in _windows(f, layers, family)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        tied=f.flag("tie_word_embeddings", False),
        rope=_rope(f),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias", False) if family == "llama" else False,
    )


def _opt(f: Fields) -> ModelConfig:
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if hidden % heads and f.raw.get("halve_layers") is None:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}")
    embed = f.integer("word_embed_proj_dim", hidden)
    bias, before = f.flag("enable_bias", True), f.flag("do_layer_norm_before", True)
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        head_dim=f.integer("head_dim", hidden // heads),
        max_positions=f.integer("max_position_embeddings", 2048),
        layers=(LayerConfig(heads, heads, f.integer("ffn_dim")),) * f.integer("num_hidden_layers"),
        norm_eps=1e-5,
        activation=f.activation("activation_function", "relu"),
        tied=f.flag("tie_word_embeddings", True),
        position_offset=2,
        norm="layer",
        norm_affine=f.flag("layer_norm_elementwise_affine", True),
        norm_first=before,
        final_norm=before and not f.flag("_remove_final_layer_norm", False),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        embed_size=0 if embed == hidden else embed,
    )


LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "block": "model.layers.{}",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
OPT_NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "block": "model.decoder.layers.{}",
    "attn_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}


@dataclass(frozen=True)
class Family:
    """How one Hugging Face `model_type` maps onto the decoder."""

    parse: Callable[[Fields], ModelConfig]
    names: dict[str, str]
    # config fields a pruned model of uniform width rewrites; empty: such widths need `model_type: "halve"`
    width_fields: dict[str, str]
    # transformers refuses a config of this type whose number of heads does not divide its hidden size
    heads_divide_hidden: bool = False

    def block_name(self, layer: int, role: str) -> str:
        return f"{self.names['block'].format(layer)}.{self.names[role]}"


_WIDTHS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
}
FAMILIES: dict[str, Family] = {
    "llama": Family(lambda f: _llama_like(f, "llama"), LLAMA_NAMES, _WIDTHS, heads_divide_hidden=True),
    "mistral": Family(lambda f: _llama_like(f, "mistral"), LLAMA_NAMES, _WIDTHS),
    "qwen2": Family(lambda f: _llama_like(f, "qwen2"), LLAMA_NAMES, _WIDTHS),
    "qwen3": Family(lambda f: _llama_like(f, "qwen3"), LLAMA_NAMES, _WIDTHS),
    "opt": Family(_opt, OPT_NAMES, {"intermediate_size": "ffn_dim"}),
}


@dataclass(frozen=True)
class LinearShape:
    """One linear of the model: its Hugging Face name, its role in the block and its full widths."""

    name: str
    role: str
    layer: int | None
    out_features: int
    in_features: int
    bias: bool


def parse_config(raw: Json, origin: str) -> tuple[Family, ModelConfig]:
    """The family and the decoder's config of a config.json.

    Raises UnsupportedModelError for an unknown `model_type` or any field that is neither handled nor harmless.
    """
    kind = raw.get("model_type")
    base = raw.get("halve_model_type") if kind == "halve" else kind
    if base not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(f"{origin}: model_type={base!r} is not supported: use a model of type {known}")
    if raw.get("auto_map"):
        raise UnsupportedModelError(f"{origin}: auto_map asks for code from the model's author, which is never run")
    family, fields = FAMILIES[base], Fields(raw, origin)
    config = family.parse(fields)
    fields.refuse_unread()
    if kind == "halve":
        config = _with_layers(config, raw, origin)
    return family, config


def _with_layers(config: ModelConfig, raw: Json, origin: str) -> ModelConfig:
    """The widths of each layer, which a `halve` config spells out."""
    try:
        layers = tuple(LayerConfig(**layer) for layer in raw["halve_layers"])
    except (KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{origin}: halve_layers is missing or malformed ({error})") from error
    return replace(config, layers=layers)


def block_linears(family: Family, config: ModelConfig, index: int) -> list[LinearShape]:
    """The linears of one layer in the order they run."""
    layer, hidden = config.layers[index], config.hidden_size
    shapes: list[tuple[str, int, int, bool]] = []
    if layer.has_attention:
        queries, keys = layer.num_heads * config.head_dim, layer.num_kv_heads * config.head_dim
        shapes += [("q_proj", queries, hidden, config.qkv_bias)]
        shapes += [(role, keys, hidden, config.qkv_bias) for role in ("k_proj", "v_proj")]
        shapes += [("o_proj", hidden, queries, config.o_bias)]
    if layer.has_mlp:
        roles = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        shapes += [(role, layer.intermediate_size, hidden, config.mlp_bias) for role in roles]
        shapes += [("down_proj", hidden, layer.intermediate_size, config.mlp_bias)]
    return [LinearShape(family.block_name(index, role), role, index, o, i, b) for role, o, i, b in shapes]


def head_linear(family: Family, config: ModelConfig) -> LinearShape:
    """The output head."""
    width = config.embed_size or config.hidden_size
    return LinearShape(family.names["head"], "head", None, config.vocab_size, width, False)


def projection_linears(family: Family, config: ModelConfig) -> list[LinearShape]:
    """OPT-350m's projections between embedding and hidden size; never compressed."""
    if not config.embed_size:
        return []
    hidden, embed = config.hidden_size, config.embed_size
    return [
        LinearShape(family.names["project_in"], "project_in", None, hidden, embed, False),
        LinearShape(family.names["project_out"], "project_out", None, embed, hidden, False),
    ]


def vector_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not part of a linear: embeddings, positions, norms."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{family.names['embed']}.weight": (config.vocab_size, config.embed_size or config.hidden_size)
    }
    if config.rope is None:
        rows = config.max_positions + config.position_offset
        shapes[f"{family.names['positions']}.weight"] = (rows, config.hidden_size)
    parts = ("weight", "bias") if config.norm == "layer" else ("weight",)

    def norm(name: str, size: int, parts: tuple[str, ...]) -> None:
        if config.norm_affine:
            shapes.update({f"{name}.{part}": (size,) for part in parts})

    if config.final_norm:
        norm(family.names["final_norm"], config.hidden_size, parts)
    for index, layer in enumerate(config.layers):
        if layer.has_attention:
            norm(family.block_name(index, "attn_norm"), config.hidden_size, parts)
            if config.qk_norm:
                norm(family.block_name(index, "q_norm"), config.head_dim, ("weight",))
                norm(family.block_name(index, "k_norm"), config.head_dim, ("weight",))
        if layer.has_mlp:
            norm(family.block_name(index, "mlp_norm"), config.hidden_size, parts)
    return shapes
