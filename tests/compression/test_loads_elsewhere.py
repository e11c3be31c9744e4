"""Every kind of folder that is said to load in transformers does, with our logits: families and their variants by recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halve import compress
from tests.common import logits, relative, their_logits

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "opt": ("opt", {}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt, head of its own": ("opt", {"word_embed_proj_dim": 16, "tie_word_embeddings": False}),
}
RECIPES: dict[str, list[str]] = {
    "rtn and head": ["rtn:bits=4,group_size=16,targets=Linear|lm_head,untie=true"],
    "rtn and embedding": ["rtn:bits=4,group_size=16,targets=Linear|embed_tokens"],
    "embedding, asymmetric": ["rtn:bits=8,group_size=16,symmetric=false,targets=Embedding"],
    "rtn, two schemes": ["rtn:bits=4,group_size=16,ignore=*v_proj", "rtn:bits=8"],
    "gptq": ["gptq:bits=4,group_size=16"],
    "prune-mlp": ["prune-mlp:fraction=0.3,multiple_of=16"],
    "drop-layers": ["drop-layers:layers=1"],
    "all of it": ["drop-layers:layers=0", "prune-mlp:fraction=0.3,multiple_of=16", "gptq:bits=4,group_size=16"],
}


pytestmark = pytest.mark.usefixtures("drawn_windows")


def made(make_hf, model: str) -> Path:
    kind, options = MODELS[model]
    return make_hf(kind, **options)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_our_logits(make_hf, tmp_path: Path, model: str, recipe: str) -> None:
    out = compress(made(make_hf, model), tmp_path / "out", RECIPES[recipe]).out
    assert json.loads((out / "config.json").read_text())["model_type"] != "halve"
    assert relative(logits(out), their_logits(out)) < 1e-5


@pytest.mark.parametrize("model", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_heads_that_go(make_hf, tmp_path: Path, model: str) -> None:
    out = compress(made(make_hf, model), tmp_path / "out", ["prune-heads:fraction=0.5", "rtn:bits=8"]).out
    assert relative(logits(out), their_logits(out)) < 1e-5
