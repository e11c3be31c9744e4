"""Configs drawn field by field, and what halve and transformers make of each: the same logits, or a refusal on one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halve import compress, load_model
from halve.errors import HalveError
from tests.common import relative

TOKENS = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(4))
PREFIX = 9  # tokens before the cached ones: fewer than there are in a window of 12, more than in one of 5
ABSENT = "ABSENT"
BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
GEMMA = BASE | {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 11, "pad_token_id": 0}
BASES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": BASE | {"sliding_window": 12},
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "smollm3": BASE | {"pad_token_id": 0, "no_rope_layer_interval": 2},
    "granite": BASE,
    "olmo2": BASE,
    "ministral": BASE | {"sliding_window": 12, "head_dim": 8},
    "gemma": BASE | {"head_dim": 8, "pad_token_id": 0},
    "vaultgemma": GEMMA,
    "olmo3": BASE | {"sliding_window": 12},
    "exaone4": BASE | {"sliding_window": 12, "sliding_window_pattern": 2},
    "ministral3": BASE | {"head_dim": 8, "sliding_window": 12, "pad_token_id": 0},
    "seed_oss": BASE | {"head_dim": 8},
    "ernie4_5": BASE | {"head_dim": 8},
    "arcee": BASE,
    "jais2": BASE,
    "nemotron": BASE,
    "starcoder2": BASE | {"sliding_window": 12},
    "stablelm": BASE | {"partial_rotary_factor": 0.5},
    "phi3": BASE | {"pad_token_id": 0, "sliding_window": 12},
    "opt": {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "intermediate_size")} | {"ffn_dim": 24},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
ROPES: list[Any] = [
    None,
    {},
    {"rope_type": "default", "rope_theta": 50.0},
    {"rope_type": "default", "factor": 7.0},
    {"rope_theta": 20.0},
    {"rope_type": "linear", "factor": 3.0},
    {"type": "linear", "factor": 3.0, "rope_theta": 100},
    {"type": "linear", "rope_type": "default", "factor": 3.0},
    {"type": "default", "rope_type": "linear", "factor": 3},
    {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 2.0},
    LONGROPE,
    {**LONGROPE, "original_max_position_embeddings": 32},
    {**LONGROPE, "original_max_position_embeddings": 8, "rope_theta": 300.0},
    {**LONGROPE, "factor": 8.0, "attention_factor": 0.7, "original_max_position_embeddings": 8},
    {**LONGROPE, "rope_type": "su"},
    {**LONGROPE, "partial_rotary_factor": 0.5},
    {**LONGROPE, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    {**LONGROPE, "long_factor": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 200.0},
    {"rope_type": None, "type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": None},
    {**YARN, "llama_4_scaling_beta": 0.2},
    {"rope_type": "default", "llama_4_scaling_beta": 0.2, "original_max_position_embeddings": 5},
    YARN,
    {"type": "yarn", "factor": 4.0},
    {**YARN, "rope_theta": 300.0, "attention_factor": 0.7},
    {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False},
    {**YARN, "beta_fast": 1, "beta_slow": 4},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    {**YARN, "mscale": 0.7, "factor": 0.5, "truncate": None},
    {**YARN, "original_max_position_embeddings": 2},
    {**YARN, "original_max_position_embeddings": None},
    {**YARN, "factor": None},
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 500.0},
    {**LLAMA3, "original_max_position_embeddings": 16, "high_freq_factor": 1.0},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    {"full_attention": {"rope_theta": 70.0}, "sliding_attention": {"rope_type": "linear", "factor": 5.0}},
    {"full_attention": YARN, "sliding_attention": None},
    {"sliding_attention": {"rope_type": "default", "rope_theta": 30.0}},
    {"full_attention": {"rope_theta": 70.0}, "rope_type": "linear", "factor": 2.0},
]
KINDS = [None, ["full_attention", "sliding_attention"], ["full_attention"] * 2, ["sliding_attention"] * 2]
KINDS += [["sliding_attention"], ["chunked_attention", "full_attention"], ["attention", "full_attention"]]
# Every field of the families' config classes in transformers, and fields met in published configs: values that matter.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [57],
    "hidden_size": [48, 36],
    "intermediate_size": [40, ABSENT],
    "ffn_dim": [40],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [8, 2, 1, 6],
    "num_key_value_heads": [1, 4, 3, None, ABSENT],
    "head_dim": [16, 4, 5, 0, None, ABSENT],
    "hidden_act": [
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "relu",
        "swish",
        "gelu_fast",
        "quick_gelu",
        "relu2",
        "laplace",
    ],
    "activation_function": ["gelu", "silu", "gelu_fast"],
    "max_position_embeddings": [32, 100, ABSENT],
    "rms_norm_eps": [0.3, 1e-12, 0.0, 1, ABSENT],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False, None],
    "mlp_bias": [True],
    "rope_theta": [30.0, 1000000, None],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [8, None],
    "sliding_window": [5, 30, None, 0, ABSENT],
    "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, -1],
    "layer_types": KINDS,
    "attention_chunk_size": [5],
    "logits_scaling": [4.0, 2, 0, None],
    "residual_multiplier": [0.3, 2, None],
    "embedding_multiplier": [12.0, 0],
    "attention_multiplier": [0.1, -1],
    "no_rope_layers": [[0, 1], [0, 0, 1, 1], [1], None, [2, 0], [True, 0]],
    "no_rope_layer_interval": [1, 3, 0],
    "sliding_window_pattern": [1, 2, 3, 0],
    "rope_local_base_freq": [40.0],
    "hidden_activation": ["gelu", "silu", "relu2", ABSENT],
    "use_bidirectional_attention": [True, False, None],
    "query_pre_attn_scalar": [16, 8.0, ABSENT],
    "final_logit_softcapping": [3.0, 30, None, 0.0],
    "attn_logit_softcapping": [0.5, 50, None],
    "is_causal": [False, True, None],
    "per_layer_config": [{"0": {"intermediate_size": 12}}, None],
    "kv_sharing_modes": [["store", "reuse"], None],
    "do_layer_norm_before": [False, True],
    "_remove_final_layer_norm": [True],
    "word_embed_proj_dim": [16, None],
    "enable_bias": [False],
    "layer_norm_elementwise_affine": [False],
    "pad_token_id": [1, -1, 0, 40, None],
    "bos_token_id": [3, None],
    "eos_token_id": [4, [4, 5], None],
    "initializer_range": [0.5, 1],
    "init_std": [0.5],
    "use_cache": [False, True],
    "pretraining_tp": [2, None],
    "attention_dropout": [0.5, 0],
    "dropout": [0.5],
    "layerdrop": [0.5],
    "resid_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "residual_dropout": [0.5],
    "embedding_dropout": [0.5],
    "hidden_dropout": [0.5],
    "norm_eps": [0.3, 1],
    "norm_epsilon": [0.3, None],
    "layer_norm_eps": [0.3, 0.0],
    "attention_out_bias": [True, None],
    "use_bias": [True, False, None],
    "use_qkv_bias": [True, None],
    "qk_layernorm": [True, False],
    "use_parallel_residual": [True, False],
    "output_hidden_states": [True, None],
    "return_dict": [True],
    "chunk_size_feed_forward": [8],
    "is_encoder_decoder": [True],
    "architectures": [["LlamaForCausalLM"], None],
    "transformers_version": ["4.28.1", None],
    "dtype": ["float32", None, "float7"],
    "torch_dtype": ["float32", None],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression", None],
}
UNREAD: dict[str, list[Any]] = {
    "max_sequence_length": [2048],
    "axolotl_version": ["0.4.0"],
    "unsloth_version": ["2024.9"],
    "num_local_experts": [8],
    "qkv_bias": [True],
    "clip_qkv": [0.5],
    "use_qk_norm": [True],
    "rotary_dim": [4],
    "rope_interleaved": [True],
    "multi_query": [True],
    "sep_token_id": [2],
    "_attn_implementation": ["eager"],
    "output_attentions": [True],
    "repetition_penalty": [1.3],
    "model_name": ["a"],
    "transformers.js_config": [{"dtype": "q4"}],
    "use_mrope": [False],
    "attn_temperature_tuning": [True],
}


VALUES |= UNREAD


def draws(kind: str, pairs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every single change of the base config, then `pairs` drawn pairs of changes of two fields."""
    yield from ({field: value} for field, values in VALUES.items() for value in values)
    chosen, both = random.Random(f"{kind} {seed}"), list(combinations(VALUES, 2))
    # what has many values is drawn more often: it is what differs most between configs
    weights = [len(VALUES[a]) * len(VALUES[b]) for a, b in both]
    for fields in chosen.choices(both, weights, k=pairs):
        yield {field: chosen.choice(VALUES[field]) for field in fields}


def write_model(kind: str, changes: dict[str, Any], folder: Path) -> str | None:
    """A folder with the config and, as transformers shapes them, random weights; why there can be none of those."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    raw = {"model_type": kind} | BASES[kind] | changes
    raw = {key: value for key, value in raw.items() if not (isinstance(value, str) and value == ABSENT)}
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    except Exception as error:  # whatever it is that transformers refuses a config with
        return f"{type(error).__name__}: {error}"
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = mean + 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return None


def agree(folder: Path, generated: bool) -> str | None:
    """How the logits of halve and transformers differ for a folder; None where they do not.

    With `generated` also those of tokens that come one after another, as generation computes them with a cache.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ours = load_model(folder)(TOKENS)
        error = relative(ours, model(TOKENS, use_cache=False).logits)
        if not error < 1e-5:  # rounding of float32 in two layers is near 1e-6
            return f"logits differ by {error:.1e}"
        if not generated:
            return None
        cache, rows = None, []
        for tokens in TOKENS.split([PREFIX, *[3] * 5], dim=1):
            step = model(tokens, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits)
    error = relative(ours, torch.cat(rows, 1))
    return None if error < 1e-5 else f"logits of cached tokens differ by {error:.1e}"


def outcome(kind: str, changes: dict[str, Any], place: Path, ship: bool) -> tuple[str, str]:
    """(equal | refused | unloadable | DIFFERENT, why) for one config; with `ship` also of what `compress` makes of it.

    unloadable: transformers refuses the config, halve does not.
    """
    folder, out = place / "model", place / "out"
    failed = write_model(kind, changes, folder)
    try:
        if failed is not None:
            load_model(folder, random_weights=True)
            return "unloadable", failed
        load_model(folder)
    except HalveError as error:
        return ("DIFFERENT" if "\n" in str(error) or ": " not in str(error) else "refused"), str(error)
    try:
        why = agree(folder, generated=False)
    except Exception as error:
        return "unloadable", f"{type(error).__name__}: {error}"
    if why is None and ship:
        shutil.rmtree(out, ignore_errors=True)
        several = changes.get("num_hidden_layers", 2) > 1 and len(changes) < 2
        compress(str(folder), str(out), ["drop-layers:layers=0"] if several else ["rtn:bits=8,group_size=4"])
        if kind == "phi3" and json.loads((out / "config.json").read_text())["model_type"] == "halve":
            return "equal", ""  # with a part of each head turned: none that transformers has can hold it
        why = agree(out, generated=True)
        why = why and f"as compressed: {why}"
    return ("equal", "") if why is None else ("DIFFERENT", why)
