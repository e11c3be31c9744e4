"""Hugging Face configs and weight names <-> the decoder. A new family is one entry in FAMILIES."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from halve.errors import UnsupportedModelError, shown
from halve.model.config import LayerConfig, ModelConfig
from halve.model.family import ATTENTION_BIAS, LLAMA_NAMES, MLP_BIAS, WIDTHS, Family, opt_like
from halve.model.fields import Fields, Json, is_whole
from halve.model.inventory import parameters
from halve.model.layer_rules import (
    every_fourth,
    every_fourth_by_pattern,
    every_second,
    every_sixth,
    growing_rope,
    kinds_or_one_window,
    one_window,
    part_rope,
    rope_by_list,
    rope_by_window,
    rope_by_window_alone,
    rope_of_neighbours,
    rope_of_windows,
    windows_by_layer,
    windows_without_rope,
)
from halve.model.refused import reason
from halve.model.wrappers import ALIASES, WRAPPERS

MAX_PARAMETERS = 10**13  # several times the largest model there is

GEMMA_NAMES = LLAMA_NAMES | {
    "attn_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
UNGATED_NAMES = {role: name for role, name in LLAMA_NAMES.items() if role != "gate_proj"}
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
    biases=ATTENTION_BIAS,
    windows=every_second,
)
_OLMO2 = Family(
    names=GEMMA_NAMES,
    nullable=frozenset({"num_key_value_heads"}),
    biases=ATTENTION_BIAS,
    defaults={"rms_norm_eps": 1e-5},
    norm_input=False,
    norm_output=True,
    qk_norm=True,
    qk_norm_whole=True,
)
_MINISTRAL3_ROPE = {
    **{"type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        heads_divide_hidden=True,
        biases=ATTENTION_BIAS | MLP_BIAS,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
    ),
    "mistral": Family(
        default_kv_heads=8, default_positions=131072, nullable=frozenset({"head_dim"}), windows=one_window
    ),
    # as wrappers make it: with rotary embedding of a part of each head, and tensors that transformers has merged
    "phi3": Family(stock=False, windows=one_window, ropes=part_rope, dropouts=("resid_pdrop", "embd_pdrop")),
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
        biases=ATTENTION_BIAS,
        windows=windows_by_layer,
    ),
    "gemma": Family(
        default_kv_heads=16,
        default_head_dim=256,
        default_positions=8192,
        defaults={"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        activations={"gelu": "gelu_pytorch_tanh"},  # what the first configs called it
        neutral={"use_bidirectional_attention": (False, None)},
        norm_offset=1.0,
        embed_scaled=True,
        biases=ATTENTION_BIAS,
    ),
    "gemma2": _GEMMA2,
    "vaultgemma": replace(_GEMMA2, names=LLAMA_NAMES | {"mlp_norm": "pre_feedforward_layernorm"}, norm_output=False),
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
        biases=ATTENTION_BIAS | MLP_BIAS,
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0, "sliding_window": None},
        windows=windows_without_rope,
        ropes=rope_by_list,
    ),
    "granite": Family(
        nullable=frozenset({"num_key_value_heads"}),
        biases=ATTENTION_BIAS | MLP_BIAS,
        numbers={
            "embed_scale": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_divisor": "logits_scaling",
        },
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows=every_fourth, ropes=rope_by_window_alone),
    "exaone4": Family(
        names=GEMMA_NAMES,
        default_kv_heads=32,
        defaults={"rms_norm_eps": 1e-5},
        norm_input=False,
        norm_output=True,
        qk_norm=True,
        windows=every_fourth_by_pattern,
        ropes=rope_of_windows,
    ),
    "ministral": Family(
        default_kv_heads=8,
        default_positions=131072,
        windows=kinds_or_one_window,
    ),
    "ministral3": Family(
        default_kv_heads=8,
        default_head_dim=128,
        default_positions=262144,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": _MINISTRAL3_ROPE},
        neutral={"layer_types": (None,)},
        windows=one_window,
        ropes=growing_rope,
    ),
    "seed_oss": Family(
        default_kv_heads=8,
        default_head_dim=128,
        default_positions=524288,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"attention_bias": True},
        dropouts=("residual_dropout",),
        biases={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias"} | MLP_BIAS,
    ),
    "ernie4_5": Family(
        default_kv_heads=2,
        default_head_dim=128,
        default_positions=131072,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0},
        biases=dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias"),
        ropes=rope_of_neighbours,
    ),
    "arcee": Family(
        names=UNGATED_NAMES,
        heads_divide_hidden=True,
        default_positions=4096,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5},
        biases=ATTENTION_BIAS | MLP_BIAS,
    ),
    "jais2": Family(
        names=UNGATED_NAMES,
        heads_divide_hidden=True,
        default_positions=8192,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"hidden_act": "relu2", "layer_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True},
        norm="layer",
        epsilon_field="layer_norm_eps",
        biases=ATTENTION_BIAS | MLP_BIAS,
    ),
    "nemotron": Family(
        names=UNGATED_NAMES,
        default_positions=4096,
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        norm="layer",
        norm_offset=1.0,
        epsilon_field="norm_eps",
        biases=ATTENTION_BIAS | MLP_BIAS,
        ropes=part_rope,
    ),
    "starcoder2": Family(
        names=UNGATED_NAMES | {"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
        default_kv_heads=2,
        default_positions=4096,
        defaults={
            **{"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None},
            **{"use_bias": True, "tie_word_embeddings": True},
        },
        neutral={"layer_types": (None,)},
        dropouts=("residual_dropout", "embedding_dropout"),
        norm="layer",
        epsilon_field="norm_epsilon",
        biases=dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias"),
        windows=one_window,
    ),
    "stablelm": Family(
        width_fields={ours: theirs for ours, theirs in WIDTHS.items() if ours != "head_dim"},
        default_kv_heads=32,
        default_positions=4096,
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        neutral={"use_parallel_residual": (False,), "qk_layernorm": (False,), "head_dim": (None,)},
        dropouts=("hidden_dropout",),
        norm="layer",
        epsilon_field="layer_norm_eps",
        biases={"qkv_bias": "use_qkv_bias"},
        ropes=part_rope,
    ),
    "opt": Family(parse=opt_like, names=OPT_NAMES, width_fields={"intermediate_size": "ffn_dim"}),
}


def parse_config(raw: Json, origin: str) -> tuple[Family, ModelConfig]:
    """The family and the decoder's config of a config.json.

    Raises UnsupportedModelError for an unknown `model_type`, a field that transformers reads and that is not handled, and
    a value that is none for its field.
    """
    kind = raw.get("model_type")
    base = raw.get("halve_model_type") if kind == "halve" else kind
    if not isinstance(base, str) or base not in FAMILIES:
        known = ", ".join(dict.fromkeys((*FAMILIES, *WRAPPERS, *ALIASES)))
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
