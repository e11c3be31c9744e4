"""What sets a family of models apart, as fields, and how its configs are read by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from halve.model.config import LayerConfig, ModelConfig
from halve.model.fields import MAX_LAYERS, Fields, Kinds, check_rope_sizes
from halve.model.layer_rules import Ropes, Windows, no_windows, one_rope

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


def _heads(f: Fields, family: Family) -> tuple[int, int, int]:
    """Query heads, key/value heads and their size."""
    heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
    null = heads if "num_key_value_heads" in family.nullable else None
    kv_heads = f.integer("num_key_value_heads", family.default_kv_heads or heads, null)
    if heads % kv_heads:
        raise f.fail("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads={heads}")
    if f.get("head_dim") is None and family.default_head_dim is None and hidden % heads:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}, and head_dim is not given")
    derived = hidden // heads
    head_dim = f.integer(
        "head_dim", family.default_head_dim or derived, derived if "head_dim" in family.nullable else None
    )
    if head_dim % 2:
        key = "head_dim" if "head_dim" in f.raw else "num_attention_heads"
        raise f.fail(key, f"gives heads of {head_dim} channels, which is odd: rotary embedding turns pairs")
    return heads, kv_heads, head_dim


ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
MLP_BIAS = {"mlp_bias": "mlp_bias"}
_LLAMA_CHECKED: Kinds = {
    "initializer_range": (float,),
    "attention_dropout": (int, float, None),
    "pretraining_tp": (int, None),
}
_OPT_CHECKED: Kinds = {
    "init_std": (float,),
    **dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), (int, float)),
}


def llama_like(f: Fields, family: Family) -> ModelConfig:
    f.check_kinds(_LLAMA_CHECKED | dict.fromkeys(family.dropouts, (int, float)))
    heads, kv_heads, head_dim = _heads(f, family)
    layers = f.integer("num_hidden_layers", most=MAX_LAYERS)
    width = f.integer("intermediate_size")
    positions = f.integer("max_position_embeddings", family.default_positions)
    activation = f.activation(family.activation_field, "silu")
    biased = {part: f.flag(key, False) for part, key in family.biases.items()}
    windows = family.windows(f, layers)
    ropes, rope_of = family.ropes(f, windows, positions)
    check_rope_sizes(f, ropes, head_dim)
    numbers: dict[str, Any] = {part: f.number(key, 1.0) for part, key in family.numbers.items()}
    if family.query_scalar:
        numbers["attention_scale"] = f.integer("query_pre_attn_scalar", 256) ** -0.5
    if family.embed_scaled:
        numbers["embed_scale"] = f.integer("hidden_size") ** 0.5
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        head_dim=head_dim,
        max_positions=positions,
        layers=tuple(
            LayerConfig(heads, kv_heads, width, window, rope) for window, rope in zip(windows, rope_of, strict=True)
        ),
        norm_eps=f.epsilon(family.epsilon_field, 1e-6),
        activation=family.activations.get(activation, activation),
        tied=f.flag("tie_word_embeddings", False),
        ropes=ropes,
        norm=family.norm,
        norm_offset=family.norm_offset,
        norm_input=family.norm_input,
        norm_output=family.norm_output,
        embed_scale_rounded=family.embed_scaled,
        attention_cap=f.cap("attn_logit_softcapping") if "attn_logit_softcapping" in family.caps else None,
        logit_cap=f.cap("final_logit_softcapping") if "final_logit_softcapping" in family.caps else None,
        qk_norm=family.qk_norm,
        qk_norm_whole=family.qk_norm_whole,
        gated="gate_proj" in family.names,
        qkv_bias=family.qkv_bias or biased.get("qkv_bias", False),
        o_bias=biased.get("o_bias", False),
        mlp_bias=biased.get("mlp_bias", False),
        **numbers,
    )


def opt_like(f: Fields, family: Family) -> ModelConfig:
    f.check_kinds(_OPT_CHECKED)
    hidden = f.integer("hidden_size")
    heads = f.integer("num_attention_heads")
    if hidden % heads:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}")
    embed = f.integer("word_embed_proj_dim", hidden, hidden)
    bias = f.flag("enable_bias", True)
    before = f.flag("do_layer_norm_before", True)
    removed = f.flag("_remove_final_layer_norm", False)
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        head_dim=hidden // heads,
        max_positions=f.integer("max_position_embeddings", family.default_positions),
        layers=(LayerConfig(heads, heads, f.integer("ffn_dim"), rope=None),)
        * f.integer("num_hidden_layers", most=MAX_LAYERS),
        norm_eps=1e-5,
        activation=f.activation("activation_function", "relu"),
        tied=f.flag("tie_word_embeddings", True),
        position_offset=2,
        norm="layer",
        norm_affine=f.flag("layer_norm_elementwise_affine", True),
        norm_input=before,
        norm_sum=not before,
        final_norm=before and not removed,
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        embed_size=0 if embed == hidden else embed,
    )


WIDTHS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Family:
    """How one Hugging Face `model_type` maps onto the decoder; the defaults are those of Llama."""

    # config fields a pruned model of uniform width rewrites; what is not here needs `model_type: "halve"`
    width_fields: dict[str, str] = field(default_factory=lambda: WIDTHS)
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    parse: Callable[[Fields, Family], ModelConfig] = llama_like
    # transformers' model of this type holds the tensors that are named here, where nothing else forbids
    stock: bool = True
    # transformers refuses a config of this type whose number of heads does not divide its hidden size
    heads_divide_hidden: bool = False
    default_kv_heads: int | None = None  # where the config does not say; None: as many as query heads
    default_head_dim: int | None = None  # the same; None: hidden size / query heads
    default_positions: int = 2048
    # values of other fields where a config does not say them
    defaults: dict[str, Any] = field(default_factory=dict)
    # fields that would change the maths, and the values by which they do not
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()  # those that its config class has beside that of attention
    nullable: frozenset[str] = frozenset()  # of the two fields of heads, those that may be null: as if derived
    qk_norm: bool = False  # norms over each head of queries and keys
    qk_norm_whole: bool = False  # those are over all heads together
    activation_field: str = "hidden_act"
    activations: dict[str, str] = field(default_factory=dict)  # names that stand for others, and those
    norm: str = "rms"  # or "layer"
    epsilon_field: str = "rms_norm_eps"
    norm_offset: float = 0.0  # added to the weights of norms as they are stored
    norm_input: bool = True  # norms of what sublayers read
    norm_output: bool = False  # norms of what they write
    embed_scaled: bool = False  # embeddings are multiplied by the square root of their size
    # fields of a ModelConfig that numbers of the config say, and what those are called there; 1 where it does not
    numbers: dict[str, str] = field(default_factory=dict)
    query_scalar: bool = False  # scores are divided by the square root of a field, not of the head size
    caps: frozenset[str] = frozenset()  # of the two fields of caps, those the architecture reads
    qkv_bias: bool = False  # biases of q, k and v that no field of the config switches
    biases: dict[str, str] = field(default_factory=dict)  # those of a ModelConfig, and the fields that switch them
    # sliding window of each layer (None: full attention)
    windows: Callable[[Fields, int], Windows] = no_windows
    # the rotary embeddings, and which of them each layer has
    ropes: Callable[[Fields, Windows, int], Ropes] = one_rope

    @property
    def bias_fields(self) -> frozenset[str]:
        """The fields of a config that switch biases."""
        return frozenset(self.biases.values())

    def block_name(self, layer: int, role: str) -> str:
        return f"{self.names['block'].format(layer)}.{self.names[role]}"
