"""Hugging Face configs and weight names <-> the decoder. A new family is one entry in FAMILIES."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

from halve.errors import UnsupportedModelError, shown
from halve.model.config import LayerConfig, ModelConfig
from halve.model.fields import MAX_LAYERS, Fields, Json, Kinds, is_whole, read_rope
from halve.model.wiring import ATTENTION, HEAD_NORMS, SUBLAYERS, wires


def no_windows(f: Fields, layers: int) -> list[int | None]:
    """Full attention in every layer, of architectures that know no windows."""
    return [None] * layers


def one_window(f: Fields, layers: int) -> list[int | None]:
    """Mistral: one window for all layers, or for those that `layer_types` names."""
    window = f.window()
    if "layer_types" not in f.raw:
        return [window] * layers
    if f.raw.get("head_dim") is None:  # transformers takes it for a Ministral, which has no default
        raise f.fail("head_dim", "is needed beside layer_types", "write hidden_size / num_attention_heads")
    return _windows_of_kinds(
        f, f.layer_kinds(layers) or ["sliding_attention" if window else "full_attention"] * layers, window
    )


def windows_by_layer(f: Fields, layers: int) -> list[int | None]:
    """Qwen: where windows are switched on, the layers that `layer_types` names, or else those from `max_window_layers`."""
    window = f.window() if f.flag("use_sliding_window", False) else None
    first = f.integer("max_window_layers", 28, least=0)
    kinds = f.layer_kinds(layers)
    if kinds is None:
        return [window if i >= first else None for i in range(layers)]
    return _windows_of_kinds(f, kinds, window)


def _windows_of_kinds(f: Fields, kinds: list[str], window: int | None) -> list[int | None]:
    if "sliding_attention" in kinds and window is None:
        null = "sliding_window" in f.raw and f.raw["sliding_window"] is None
        reason = "sliding_window is null" if null else "use_sliding_window is not true"
        raise f.fail("layer_types", f"names sliding_attention, but {reason}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _heads(f: Fields, family: Family) -> tuple[int, int, int]:
    """Query heads, key/value heads and their size."""
    heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
    null = heads if "num_key_value_heads" in family.nullable else None
    kv_heads = f.integer("num_key_value_heads", family.default_kv_heads or heads, null)
    if heads % kv_heads:
        raise f.fail("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads={heads}")
    if f.raw.get("head_dim") is None and family.default_head_dim is None and hidden % heads:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}, and head_dim is not given")
    derived = hidden // heads
    head_dim = f.integer(
        "head_dim", family.default_head_dim or derived, derived if "head_dim" in family.nullable else None
    )
    if head_dim % 2:
        key = "head_dim" if "head_dim" in f.raw else "num_attention_heads"
        raise f.fail(key, f"gives heads of {head_dim} channels, which is odd: rotary embedding turns pairs")
    return heads, kv_heads, head_dim


_LLAMA_CHECKED: Kinds = {
    "initializer_range": (float,),
    "attention_dropout": (int, float, None),
    "pretraining_tp": (int, None),
}
_OPT_CHECKED: Kinds = {
    "init_std": (float,),
    **dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), (int, float)),
}


def _llama_like(f: Fields, family: Family) -> ModelConfig:
    f.check_kinds(_LLAMA_CHECKED)
    heads, kv_heads, head_dim = _heads(f, family)
    layers = f.integer("num_hidden_layers", most=MAX_LAYERS)
    width = f.integer("intermediate_size")
    positions = f.integer("max_position_embeddings", family.default_positions)
    bias = "attention_bias" in family.bias_fields and f.flag("attention_bias", False)
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        head_dim=head_dim,
        max_positions=positions,
        layers=tuple(LayerConfig(heads, kv_heads, width, window) for window in family.windows(f, layers)),
        norm_eps=f.epsilon("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        tied=f.flag("tie_word_embeddings", False),
        rope=read_rope(f, positions),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias="mlp_bias" in family.bias_fields and f.flag("mlp_bias", False),
    )


def _opt(f: Fields, family: Family) -> ModelConfig:
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
        layers=(LayerConfig(heads, heads, f.integer("ffn_dim")),) * f.integer("num_hidden_layers", most=MAX_LAYERS),
        norm_eps=1e-5,
        activation=f.activation("activation_function", "relu"),
        tied=f.flag("tie_word_embeddings", True),
        position_offset=2,
        norm="layer",
        norm_affine=f.flag("layer_norm_elementwise_affine", True),
        norm_first=before,
        final_norm=before and not removed,
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        embed_size=0 if embed == hidden else embed,
    )


MAX_PARAMETERS = 10**13  # several times the largest model there is

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


_WIDTHS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Family:
    """How one Hugging Face `model_type` maps onto the decoder; the defaults are those of Llama."""

    # config fields a pruned model of uniform width rewrites; what is not here needs `model_type: "halve"`
    width_fields: dict[str, str] = field(default_factory=lambda: _WIDTHS)
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    parse: Callable[[Fields, Family], ModelConfig] = _llama_like
    # transformers refuses a config of this type whose number of heads does not divide its hidden size
    heads_divide_hidden: bool = False
    default_kv_heads: int | None = None  # where the config does not say; None: as many as query heads
    default_head_dim: int | None = None  # the same; None: hidden size / query heads
    default_positions: int = 2048
    nullable: frozenset[str] = frozenset()  # of the two fields of heads, those that may be null: as if derived
    qk_norm: bool = False  # norms over each head of queries and keys
    qkv_bias: bool = False  # biases of q, k and v that no field of the config switches
    # of attention_bias (q, k, v, o) and mlp_bias, those the architecture reads
    bias_fields: frozenset[str] = frozenset()
    # sliding window of each layer (None: full attention)
    windows: Callable[[Fields, int], list[int | None]] = no_windows

    def block_name(self, layer: int, role: str) -> str:
        return f"{self.names['block'].format(layer)}.{self.names[role]}"


FAMILIES: dict[str, Family] = {
    "llama": Family(
        heads_divide_hidden=True,
        bias_fields=frozenset({"attention_bias", "mlp_bias"}),
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
    ),
    "mistral": Family(
        default_kv_heads=8, default_positions=131072, nullable=frozenset({"head_dim"}), windows=one_window
    ),
    "qwen2": Family(
        default_kv_heads=32,
        default_positions=32768,
        nullable=frozenset({"num_key_value_heads"}),
        qkv_bias=True,
        windows=windows_by_layer,
    ),
    "qwen3": Family(
        default_kv_heads=32,
        default_head_dim=128,
        default_positions=32768,
        nullable=frozenset({"num_key_value_heads"}),
        qk_norm=True,
        bias_fields=frozenset({"attention_bias"}),
        windows=windows_by_layer,
    ),
    "opt": Family(parse=_opt, names=OPT_NAMES, width_fields={"intermediate_size": "ffn_dim"}),
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


@dataclass(frozen=True)
class NormShape:
    """One norm of the model: its Hugging Face name, its role, how many numbers it takes, and its kind (rms or layer)."""

    name: str
    role: str
    size: int
    kind: str


def parse_config(raw: Json, origin: str) -> tuple[Family, ModelConfig]:
    """The family and the decoder's config of a config.json.

    Raises UnsupportedModelError for an unknown `model_type`, a field that transformers reads and that is not handled, and
    a value that is none for its field.
    """
    kind = raw.get("model_type")
    base = raw.get("halve_model_type") if kind == "halve" else kind
    if not isinstance(base, str) or base not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(f"{origin}: model_type={shown(base)} is not supported: use a model of type {known}")
    family, fields = FAMILIES[base], Fields(raw, origin)
    if raw.get("auto_map"):
        raise fields.fail("auto_map", "asks for code from the model's author, which is never run", "use another model")
    config = family.parse(fields, family)
    fields.refuse_unhandled(config.vocab_size)
    if kind == "halve":
        config = replace(config, layers=_halve_layers(fields, len(config.layers)))
    count = parameters(config)
    if count > MAX_PARAMETERS:
        sizes = {key: value for key, value in raw.items() if isinstance(value, int)}
        largest = max(sizes, key=lambda key: sizes[key])
        raise fields.fail(largest, f"with the other sizes asks for {count:.1e} weights, more than {MAX_PARAMETERS:.0e}")
    return family, config


def _halve_layers(f: Fields, count: int) -> tuple[LayerConfig, ...]:
    """The widths of each layer, which a `halve` config spells out."""
    rows = f.raw.get("halve_layers")
    if not isinstance(rows, list) or len(rows) != count:
        raise f.fail("halve_layers", f"must list num_hidden_layers={count} layers", "get an intact copy of the model")
    return tuple(_halve_layer(f, index, row) for index, row in enumerate(rows))


def _halve_layer(f: Fields, index: int, row: Any) -> LayerConfig:
    names = [part.name for part in dataclass_fields(LayerConfig)]
    if isinstance(row, dict) and set(names[:3]) <= set(row) <= set(names):
        heads, kv_heads, width = (row[name] for name in names[:3])
        window = row.get("sliding_window")
        whole = all(is_whole(size, 0) for size in (heads, kv_heads, width)) and (window is None or is_whole(window, 1))
        if whole and (heads % kv_heads == 0 < heads if kv_heads else heads == 0):
            return LayerConfig(heads, kv_heads, width, window)
    raise UnsupportedModelError(
        f"{f.origin}: halve_layers[{index}]={shown(row)} is malformed, it must give {', '.join(names)} as whole numbers "
        "that fit together: get an intact copy of the model"
    )


def parameters(config: ModelConfig) -> int:
    """Weights of the model's matrices."""
    tables = config.vocab_size * (config.embed_size or config.hidden_size) * (1 if config.tied else 2)
    if config.rope is None:
        tables += (config.max_positions + config.position_offset) * config.hidden_size
    return tables + sum(
        wire.outputs(config, layer) * wire.inputs(config, layer) * count
        for layer, count in Counter(config.layers).items()
        for wire in wires(config, layer)
    )


def block_linears(family: Family, config: ModelConfig, index: int) -> list[LinearShape]:
    """The linears of one layer in the order they run."""
    layer = config.layers[index]
    return [
        LinearShape(
            family.block_name(index, wire.role),
            wire.role,
            index,
            wire.outputs(config, layer),
            wire.inputs(config, layer),
            getattr(config, wire.bias),
        )
        for wire in wires(config, layer)
    ]


def block_norms(family: Family, config: ModelConfig, index: int) -> list[NormShape]:
    """The norms of one layer: one for each sublayer, and where a model has them those over heads."""
    layer, norms = config.layers[index], []
    for sublayer in SUBLAYERS.values():
        if not sublayer.units(layer):
            continue
        norms.append(NormShape(family.block_name(index, sublayer.norm), sublayer.norm, config.hidden_size, config.norm))
        if config.qk_norm and sublayer is ATTENTION:
            norms += [NormShape(family.block_name(index, role), role, config.head_dim, "rms") for role in HEAD_NORMS]
    return norms


def final_norm(family: Family, config: ModelConfig) -> NormShape | None:
    """The norm between the last block and the head, None where a model has none."""
    if not config.final_norm:
        return None
    return NormShape(family.names["final_norm"], "final_norm", config.hidden_size, config.norm)


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
    final = final_norm(family, config)
    norms = [] if final is None else [final]
    for index in range(len(config.layers)):
        norms += block_norms(family, config, index)
    for norm in norms if config.norm_affine else ():
        parts = ("weight", "bias") if norm.kind == "layer" else ("weight",)
        shapes |= {f"{norm.name}.{part}": (norm.size,) for part in parts}
    return shapes
