"""Hugging Face configs and weight names <-> the decoder. A new family is one entry in FAMILIES."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from halve.errors import UnsupportedModelError, shown
from halve.model.config import LayerConfig, ModelConfig
from halve.model.family import LLAMA_NAMES, Family, opt_like
from halve.model.fields import Fields, Json, is_whole
from halve.model.layer_rules import (
    every_second,
    every_sixth,
    kinds_or_one_window,
    one_window,
    rope_by_list,
    rope_by_window,
    windows_by_layer,
    windows_without_rope,
)
from halve.model.refused import reason
from halve.model.wiring import ATTENTION, HEAD_NORMS, SUBLAYERS, wires
from halve.model.wrappers import ALIASES, WRAPPERS

MAX_PARAMETERS = 10**13  # several times the largest model there is
TABLE = "embed"  # role of the embedding

GEMMA_NAMES = LLAMA_NAMES | {
    "attn_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
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


_GEMMA2 = Family(
    names=GEMMA_NAMES,
    heads_divide_hidden=True,
    default_kv_heads=4,
    default_head_dim=256,
    default_positions=8192,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    neutral={"use_bidirectional_attention": (False, None)},
    activation_field="hidden_activation",
    norm_offset=1.0,
    norm_output=True,
    embed_scaled=True,
    query_scalar=True,
    caps=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    bias_fields=frozenset({"attention_bias"}),
    windows=every_second,
)
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
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        qk_norm=True,
        windows=every_sixth,
        ropes=rope_by_window,
        default_positions=131072,
        caps=frozenset({"final_logit_softcapping"}),
        defaults=_GEMMA2.defaults | {"vocab_size": 262208, "final_logit_softcapping": None},
        neutral=_GEMMA2.neutral | {"attn_logit_softcapping": (None,)},
    ),
    "smollm3": Family(
        default_kv_heads=4,
        default_positions=32768,
        nullable=frozenset({"num_key_value_heads"}),
        bias_fields=frozenset({"attention_bias", "mlp_bias"}),
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0, "sliding_window": None},
        windows=windows_without_rope,
        ropes=rope_by_list,
    ),
    "granite": Family(
        nullable=frozenset({"num_key_value_heads"}),
        bias_fields=frozenset({"attention_bias", "mlp_bias"}),
        numbers={
            "embed_scale": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_divisor": "logits_scaling",
        },
    ),
    "olmo2": Family(
        names=GEMMA_NAMES,
        nullable=frozenset({"num_key_value_heads"}),
        bias_fields=frozenset({"attention_bias"}),
        defaults={"rms_norm_eps": 1e-5},
        norm_input=False,
        norm_output=True,
        qk_norm=True,
        qk_norm_whole=True,
    ),
    "ministral": Family(
        default_kv_heads=8,
        default_positions=131072,
        windows=kinds_or_one_window,
    ),
    "opt": Family(parse=opt_like, names=OPT_NAMES, width_fields={"intermediate_size": "ffn_dim"}),
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
        known = ", ".join((*FAMILIES, *WRAPPERS, *ALIASES))
        why = reason(base) if isinstance(base, str) else None
        raise UnsupportedModelError(
            f"{origin}: model_type={shown(base)} is not supported{f' ({why})' if why else ''}: use a model of type {known}"
        )
    family = FAMILIES[base]
    fields = Fields(raw, origin, family.defaults)
    if raw.get("auto_map"):
        raise fields.fail("auto_map", "asks for code from the model's author, which is never run", "use another model")
    config = family.parse(fields, family)
    fields.refuse_unhandled(config.vocab_size, family.neutral)
    if kind == "halve":
        config = replace(config, layers=_halve_layers(fields, config.layers))
    count = parameters(config)
    if count > MAX_PARAMETERS:
        sizes = {key: value for key, value in raw.items() if isinstance(value, int)}
        largest = max(sizes, key=lambda key: sizes[key])
        raise fields.fail(largest, f"with the other sizes asks for {count:.1e} weights, more than {MAX_PARAMETERS:.0e}")
    return family, config


HALVE_LAYER = ("num_heads", "num_kv_heads", "intermediate_size", "sliding_window")


def _halve_layers(f: Fields, full: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers with the widths of each, which a `halve` config spells out."""
    rows, count = f.raw.get("halve_layers"), len(full)
    if not isinstance(rows, list) or len(rows) != count:
        raise f.fail("halve_layers", f"must list num_hidden_layers={count} layers", "get an intact copy of the model")
    return tuple(_halve_layer(f, index, row, full[index]) for index, row in enumerate(rows))


def _halve_layer(f: Fields, index: int, row: Any, full: LayerConfig) -> LayerConfig:
    names = HALVE_LAYER
    if isinstance(row, dict) and set(names[:3]) <= set(row) <= set(names):
        heads, kv_heads, width = (row[name] for name in names[:3])
        window = row.get("sliding_window")
        whole = all(is_whole(size, 0) for size in (heads, kv_heads, width)) and (window is None or is_whole(window, 1))
        if whole and (heads % kv_heads == 0 < heads if kv_heads else heads == 0):
            return LayerConfig(heads, kv_heads, width, window, full.rope)
    raise UnsupportedModelError(
        f"{f.origin}: halve_layers[{index}]={shown(row)} is malformed, it must give {', '.join(names)} as whole numbers "
        "that fit together: get an intact copy of the model"
    )


def parameters(config: ModelConfig) -> int:
    """Weights of the model's matrices."""
    tables = config.vocab_size * (config.embed_size or config.hidden_size) * (1 if config.tied else 2)
    if not config.ropes:
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
    """The norms of one layer: those around each sublayer, and where a model has them those over heads."""
    layer, norms = config.layers[index], []
    for sublayer in SUBLAYERS.values():
        if not sublayer.units(layer):
            continue
        around = {sublayer.norm: config.norm_input or config.norm_sum, sublayer.output_norm: config.norm_output}
        norms += [
            NormShape(family.block_name(index, role), role, config.hidden_size, config.norm)
            for role, there in around.items()
            if there
        ]
        if config.qk_norm and sublayer is ATTENTION:
            heads = (layer.num_heads, layer.num_kv_heads) if config.qk_norm_whole else (1, 1)
            sizes = dict(zip(HEAD_NORMS, (config.head_dim * count for count in heads), strict=True))
            norms += [NormShape(family.block_name(index, role), role, size, "rms") for role, size in sizes.items()]
    return norms


def final_norm(family: Family, config: ModelConfig) -> NormShape | None:
    """The norm between the last block and the head, None where a model has none."""
    if not config.final_norm:
        return None
    return NormShape(family.names["final_norm"], "final_norm", config.hidden_size, config.norm)


def table_linear(family: Family, config: ModelConfig) -> LinearShape:
    """The embedding: a row for each token. Where it is tied, the output head multiplies by it as well."""
    width = config.embed_size or config.hidden_size
    return LinearShape(family.names[TABLE], TABLE, None, config.vocab_size, width, False)


def head_linear(family: Family, config: ModelConfig) -> LinearShape:
    """The output head."""
    return replace(table_linear(family, config), name=family.names["head"], role="head")


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
    """Every tensor that is not part of a linear or the embedding: positions, norms."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not config.ropes:
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
