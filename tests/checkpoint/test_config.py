"""What is written of a config and of its schemes reads back as the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halve.checkpoint.config import config_json
from halve.checkpoint.schemes import read_schemes, write_schemes
from halve.model.config import ModelConfig
from halve.model.families import parse_config
from halve.quantization import QuantSpec
from tests.common import GEMMA, NEWER

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS = {
    "llama": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    "smollm3": ("smollm3", {**SLIDING, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "olmo2": ("olmo2", {}),
    **{kind: (kind, options) for kind, options in NEWER},
    "opt": ("opt", {"word_embed_proj_dim": 16}),
}


def changed(config: ModelConfig, change: str) -> tuple[ModelConfig, bool]:
    """The config after a change, and whether the stock architecture can say it."""
    first, second, third = config.layers
    if change == "as it was":
        return config, True
    if change == "a layer less, the head its own":
        return replace(config, layers=(first, third), tied=False), True
    if change == "all equally narrower":
        return replace(config, layers=tuple(replace(layer, intermediate_size=24) for layer in config.layers)), True
    layers = (replace(first, intermediate_size=0), replace(second, num_heads=2, num_kv_heads=2), third)
    return replace(config, layers=layers), False


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "change", ["as it was", "a layer less, the head its own", "all equally narrower", "each in its way"]
)
@pytest.mark.parametrize("model", MODELS)
def test_a_config_reads_back(make_hf, model: str, change: str, dtype: torch.dtype | None) -> None:
    kind, options = MODELS[model]
    raw = json.loads((Path(make_hf(kind, **options)) / "config.json").read_text())
    family, config = parse_config(raw, "source")
    expected, plain = changed(config, change)
    written = json.loads(json.dumps(config_json(raw, family, expected, plain, None, dtype)))
    assert parse_config(written, "written") == (family, expected)
    assert (written["model_type"] == "halve") == (not plain)
    # and once more from what was written, as a second recipe does
    assert config_json(written, family, expected, plain, None, dtype) == written


NAMES = [f"model.layers.{layer}.{role}" for layer in range(3) for role in ("q_proj", "down_proj")] + ["lm_head"]


@pytest.mark.parametrize(
    "schemes",
    [
        dict.fromkeys(NAMES[:-1], QuantSpec(4, 32)),
        dict.fromkeys(NAMES[::2], QuantSpec(8, -1, False)),
        {name: QuantSpec(4, 32) if "q_proj" in name else QuantSpec(3, -1, False) for name in NAMES[:5]},
    ],
)
def test_schemes_read_back(schemes: dict[str, QuantSpec]) -> None:
    assert read_schemes(json.loads(json.dumps(write_schemes(schemes, NAMES))), NAMES, "written") == schemes
