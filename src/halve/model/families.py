"""Hugging Face configs and weight names <-> the decoder. A new family is one entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from halve.errors import UnsupportedModelError
from halve.model.config import LayerConfig, ModelConfig
from halve.model.fields import Fields, Json, read_rope
from halve.model.wiring import ATTENTION, HEAD_NORMS, SUBLAYERS, wires


def no_windows(f: Fields, layers: int) -> list[int | None]:
    """Full attention in every layer; a config that asks for windows is refused."""
    if f.optional("sliding_window") is not None:
        raise f.fail("sliding_window", "is not part of this architecture")
    return [None] * layers


def one_window(f: Fields, layers: int) -> list[int | None]:
    """Mistral: one window for all layers. The field missing means the class default, 4096; null means none."""
    f.read |= {"sliding_window", "layer_types"}
    return [f.raw.get("sliding_window", 4096)] * layers


def windows_by_layer(f: Fields, layers: int) -> list[int | None]:
    """Qwen: where windows are switched on, the layers that `layer_types` names, or else those from `max_window_layers`."""
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


def _heads(f: Fields, family: Family) -> tuple[int, int, int]:
    """Query heads, key/value heads and their size."""
    heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", family.default_kv_heads or heads)
    if heads % kv_heads:
        raise f.fail("num_key_value_heads", f"does not divide num_attention_heads={heads}")
    hidden = f.integer("hidden_size")
    head_dim = f.integer("head_dim", family.default_head_dim or hidden // heads)
    if f.raw.get("head_dim") is None and family.default_head_dim is None and hidden % heads:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}, and head_dim is not given")
    return heads, kv_heads, head_dim


def _llama_like(f: Fields, family: Family) -> ModelConfig:
    heads, kv_heads, head_dim = _heads(f, family)
    layers = f.integer("num_hidden_layers")
    width = f.integer("intermediate_size")
    bias = "attention_bias" in family.bias_fields and f.flag("attention_bias", False)
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        head_dim=head_dim,
        max_positions=f.integer("max_position_embeddings", 2048),
        layers=tuple(LayerConfig(heads, kv_heads, width, window) for window in family.windows(f, layers)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        tied=f.flag("tie_word_embeddings", False),
        rope=read_rope(f),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias="mlp_bias" in family.bias_fields and f.flag("mlp_bias", False),
    )


def _opt(f: Fields, family: Family) -> ModelConfig:
    hidden = f.integer("hidden_size")
    heads = f.integer("num_attention_heads")
    if hidden % heads and f.raw.get("halve_layers") is None:
        raise f.fail("num_attention_heads", f"does not divide hidden_size={hidden}")
    embed = f.integer("word_embed_proj_dim", hidden)
    bias = f.flag("enable_bias", True)
    before = f.flag("do_layer_norm_before", True)
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
    qk_norm: bool = False  # norms over each head of queries and keys
    qkv_bias: bool = False  # biases of q, k and v that no field of the config switches
    # of attention_bias (q, k, v, o) and mlp_bias, those the architecture reads
    bias_fields: frozenset[str] = frozenset()
    # sliding window of each layer (None: full attention)
    windows: Callable[[Fields, int], list[int | None]] = no_windows

    def block_name(self, layer: int, role: str) -> str:
        return f"{self.names['block'].format(layer)}.{self.names[role]}"


FAMILIES: dict[str, Family] = {
    "llama": Family(heads_divide_hidden=True, bias_fields=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(default_kv_heads=8, windows=one_window),
    "qwen2": Family(qkv_bias=True, windows=windows_by_layer),
    "qwen3": Family(
        default_head_dim=128,
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
    config = family.parse(fields, family)
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
