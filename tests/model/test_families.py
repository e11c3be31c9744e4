"""The decoder against transformers, for every family with all its options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halve import load_model
from halve.checkpoint.reader import open_checkpoint
from halve.errors import UnsupportedModelError
from halve.model.config import LayerConfig, ModelConfig
from halve.model.families import FAMILIES, Family, parse_config
from halve.model.layer_rules import windows_by_layer
from halve.model.rotary import RopeConfig
from tests.common import GEMMA, GRANITE, MINISTRAL3_ROPE, NEWER, relative

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"}),
    "mistral-sliding": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", SLIDING),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-sliding-bias": ("qwen3", {**SLIDING, "head_dim": 8, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0}),
    "gemma2-no-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    "gemma3-two-ropes": ("gemma3_text", {**GEMMA, "rope_parameters": TWO_ROPES, "layer_types": KINDS}),
    "gemma3-cap-bias": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 2.0, "attention_bias": True}),
    "gemma3-untied": ("gemma3_text", {**GEMMA, "tie_word_embeddings": False, "num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    "smollm3-sliding": ("smollm3", {**SLIDING, "pad_token_id": 0, "no_rope_layers": [0, 1, 0], "attention_bias": True}),
    "granite": ("granite", GRANITE),
    "granite-yarn": ("granite", {**GRANITE, "rope_parameters": YARN, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2, "attention_bias": True}),
    "ministral": ("ministral", {"sliding_window": 5, "layer_types": KINDS, "head_dim": 16}),
    **{kind: (kind, options) for kind, options in NEWER},
    "gemma-gelu": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "tie_word_embeddings": False}),
    "olmo3-mixed": ("olmo3", {"layer_types": KINDS, "sliding_window": 5}),
    "olmo3-two-ropes": ("olmo3", {"rope_scaling": YARN, "layer_types": KINDS, "sliding_window": 5}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ministral3-linear": (
        "ministral3",
        {"rope_parameters": MINISTRAL3_ROPE | {"rope_type": "linear", "original_max_position_embeddings": 3}},
    ),
    "ernie4_5-yarn": ("ernie4_5", {"head_dim": 16, "rope_parameters": YARN}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False}),
    "nemotron-longrope": (
        "nemotron",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}},
    ),
    "opt": ("opt", {}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-no-bias": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True, "activation_function": "gelu"}),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, make_hf) -> Path:
    kind, options = CASES[request.param]
    return make_hf(kind, **options)


@torch.inference_mode()
def test_logits_equal_transformers(folder: Path) -> None:
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    # fp32 rounding over three layers stays near 1e-6
    assert relative(load_model(folder)(tokens), theirs) < 1e-5


@torch.inference_mode()
def test_cached_decode_equals_full_forward(folder: Path) -> None:
    model = load_model(folder)
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(2))
    full = model(tokens)
    cache = model.new_cache(2, 24)
    pieces = [model(tokens[:, :9], cache), model(tokens[:, 9:14], cache)]
    pieces += [model(tokens[:, i : i + 1], cache) for i in range(14, 24)]
    assert relative(torch.cat(pieces, 1), full) < 1e-5


@torch.inference_mode()
def test_rows_of_unequal_length_agree_with_one_by_one(folder: Path) -> None:
    model = load_model(folder)
    generator = torch.Generator().manual_seed(3)
    lengths, more = [3, 12, 7], 4
    rows = [torch.randint(0, 97, (n + more,), generator=generator) for n in lengths]
    padded = torch.zeros(3, max(lengths), dtype=torch.long)
    for row, tokens, length in zip(padded, rows, lengths, strict=True):
        row[:length] = tokens[:length]
    cache = model.new_cache(3, max(lengths) + more)
    first = model(padded, cache)
    cache.lengths = torch.tensor(lengths)
    steps = [
        model(torch.stack([t[n + i : n + i + 1] for t, n in zip(rows, lengths, strict=True)]), cache)
        for i in range(more)
    ]
    for i, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = model(tokens.unsqueeze(0))[0]
        assert relative(first[i, :length], alone[:length]) < 1e-5
        assert relative(torch.stack([s[i, 0] for s in steps]), alone[length:]) < 1e-5


def _edit(folder: Path, tmp_path: Path, **changes: object) -> Path:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "DELETE"}))
    for path in folder.glob("*.safetensors"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, r"gpt_neox.*side by side"),
        ({"model_type": "qwen3_moe"}, r"not supported \(a mixture of experts"),
        ({"is_causal": False}, "is_causal"),
        ({"kv_sharing_modes": ["store", "reuse", "reuse"]}, "kv_sharing_modes"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 2.0, "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 2.0, "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "mish"}, "mish"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
    ],
)
def test_fields_that_change_the_maths_are_refused(make_hf, tmp_path: Path, changes: dict, words: str) -> None:
    folder = _edit(make_hf("llama"), tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        open_checkpoint(folder)


BARE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "intermediate_size": 48,
}


def parsed(model_type: str, **fields: object) -> ModelConfig:
    return parse_config(BARE | {"model_type": model_type} | fields, "config.json")[1]


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim", "qk_norm", "qkv_bias", "window", "positions"),
    [
        ("llama", 64, 4, False, False, None, 2048),
        ("mistral", 8, 4, False, False, 4096, 131072),
        ("qwen2", 32, 4, False, True, None, 32768),
        ("qwen3", 32, 128, True, False, None, 32768),
    ],
)
def test_what_a_bare_config_means_in_each_family(
    family: str, kv_heads: int, head_dim: int, qk_norm: bool, qkv_bias: bool, window: int | None, positions: int
) -> None:
    config = parsed(family, hidden_size=256, num_attention_heads=64)
    assert set(config.layers) == {LayerConfig(64, kv_heads, 48, window)}
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (head_dim, qk_norm, qkv_bias)
    assert not config.o_bias and not config.mlp_bias and config.gated and config.norm == "rms"
    assert (config.max_positions, config.norm_eps, config.activation) == (positions, 1e-6, "silu")
    assert not config.tied and config.ropes == (RopeConfig(10000.0),)


@pytest.mark.parametrize(
    ("family", "field", "biased"),
    [
        ("llama", "attention_bias", {"qkv_bias", "o_bias"}),
        ("llama", "mlp_bias", {"mlp_bias"}),
        ("qwen3", "attention_bias", {"qkv_bias", "o_bias"}),
        ("qwen3", "mlp_bias", set()),
        ("qwen2", "attention_bias", {"qkv_bias"}),
        ("qwen2", "mlp_bias", {"qkv_bias"}),
        ("mistral", "attention_bias", set()),
        ("mistral", "mlp_bias", set()),
    ],
)
def test_biases_that_a_config_asks_for(family: str, field: str, biased: set[str]) -> None:
    """Those that the architecture reads; the others are none in transformers either."""
    config = parsed(family, num_key_value_heads=8, **{field: True})
    assert {name for name in ("qkv_bias", "o_bias", "mlp_bias") if getattr(config, name)} == biased


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt"])
def test_heads_that_do_not_divide_the_hidden_size_need_a_size_of_their_own(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="num_attention_heads=24 does not divide hidden_size=64"):
        parsed(family, num_attention_heads=24, num_key_value_heads=8)
    if family != "opt":
        assert parsed(family, num_attention_heads=24, num_key_value_heads=8, head_dim=8).head_dim == 8


def test_qwen3_has_a_head_size_whatever_the_hidden_size() -> None:
    assert parsed("qwen3", num_attention_heads=24, num_key_value_heads=8).head_dim == 128


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def testwindows_by_layer(family: str) -> None:
    def windows(**fields: object) -> list[int | None]:
        return [layer.sliding_window for layer in parsed(family, num_key_value_heads=8, **fields).layers]

    on = {"use_sliding_window": True, "sliding_window": 5}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(sliding_window=5) == [None] * 3  # switched off
    assert windows(**on) == [None] * 3  # from layer 28 on
    assert windows(**on, max_window_layers=2) == [None, None, 5]
    assert windows(use_sliding_window=True, max_window_layers=2) == [None, None, 4096]
    assert windows(**on, layer_types=kinds) == [None, 5, None]
    for fields, words in (
        ({"layer_types": kinds}, "names sliding_attention, but use_sliding_window is not true"),
        ({**on, "layer_types": kinds[:2]}, "for each of 3 layers"),
        ({**on, "layer_types": ["chunked"] * 3}, "must name full_attention or sliding_attention"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            windows(**fields)


def testone_window_for_all_layers_of_mistral() -> None:
    assert {layer.sliding_window for layer in parsed("mistral", sliding_window=9).layers} == {9}
    assert {layer.sliding_window for layer in parsed("mistral", sliding_window=None).layers} == {None}


def test_a_new_llama_like_family_is_one_entry(make_hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of a family that says what qwen3's does, under a name of its own, and one that mixes rules."""
    qwen3 = make_hf("qwen3", head_dim=16)
    toy = _edit(qwen3, tmp_path, model_type="toy")
    with pytest.raises(UnsupportedModelError, match="model_type='toy' is not supported"):
        load_model(toy)
    monkeypatch.setitem(FAMILIES, "toy", Family(default_head_dim=128, qk_norm=True, windows=windows_by_layer))
    tokens = torch.arange(30).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(load_model(toy)(tokens), load_model(qwen3)(tokens))
    monkeypatch.setitem(FAMILIES, "toy", Family(default_kv_heads=2, default_head_dim=32, qkv_bias=True))
    config = parsed("toy")
    assert config.layers[0] == LayerConfig(16, 2, 48)
    assert (config.head_dim, config.qkv_bias, config.o_bias, config.qk_norm) == (32, True, False, False)


def test_older_config_spelling_is_read(make_hf, tmp_path: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype, as published Llama 3.x configs have them."""
    folder = make_hf("llama", rope_parameters=LLAMA3)
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    edited = _edit(folder, tmp_path, rope_parameters="DELETE", rope_theta=5e5, rope_scaling=old, torch_dtype="float32")
    tokens = torch.arange(30).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(load_model(edited)(tokens), load_model(folder)(tokens))


def test_real_models_meet_their_known_losses(assets: Path) -> None:
    """Figures of the assets' own README, from an independent float64 forward."""
    text = (assets / "data" / "tinystories_317.txt").read_text()
    stories = [s.strip() for s in text.split("<|endoftext|>") if s.strip()]
    from halve import load_tokenizer

    for name, context, expected in (("stories260K", 512, 1.506), ("babyllama-tok361", 256, 0.7045)):
        folder = assets / "models" / name
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        total, count = 0.0, 0
        for story in stories:
            tokens = torch.tensor([tokenizer.encode(story, bos=True)[:context]])
            with torch.inference_mode():
                log_probs = model(tokens).double().log_softmax(-1)
            total -= float(log_probs[0, :-1].gather(-1, tokens[0, 1:, None]).sum())
            count += tokens.shape[1] - 1
        assert total / count == pytest.approx(expected, abs=5e-4)


def test_real_models_equal_transformers(assets: Path) -> None:
    tokens = torch.randint(3, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    for name in ("stories260K", "babyllama-tok361"):
        folder = assets / "models" / name
        with torch.inference_mode():
            theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
            assert relative(load_model(folder)(tokens), theirs) < 1e-5
