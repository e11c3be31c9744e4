"""What several tests need: tokens, the families, logits of a folder, how far two results are apart, tokenizers, files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from halve import load_model
from halve.model.linear import Linear

# for models of `make_hf`, whose vocabulary has 97 entries
TOKENS = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(7))
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 1.7}
# what Hugging Face calls the model, and options for `make_hf`
MINISTRAL3_ROPE: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    "llama_4_scaling_beta": 0.3,
}
NEWER: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {"head_dim": 16, "attention_bias": True}),
    ("vaultgemma", GEMMA),
    ("olmo3", {"sliding_window": 5}),
    ("exaone4", {"sliding_window": 5, "sliding_window_pattern": 2}),
    ("ministral3", {"head_dim": 16, "sliding_window": 9, "rope_parameters": MINISTRAL3_ROPE}),
    ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    ("arcee", {}),
    ("jais2", {}),
    ("nemotron", {"attention_bias": True}),
    ("starcoder2", {"sliding_window": 7}),
    ("stablelm", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "use_qkv_bias": True}),
]
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.8}),
    ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    ("smollm3", {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    ("granite", GRANITE),
    ("olmo2", {}),
    *NEWER,
    (
        "ministral",
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    ("opt", {}),
]

# figures that every benchmark's record has
BENCHMARK: dict[str, Any] = {
    "device": "cpu", "device_name": "Chip", "dtype": "bfloat16", "random_weights": False, "batch": 1, "runs": 5,
    "prompt_tokens": 128, "new_tokens": 64, "weight_bytes": 1000, "step_weight_bytes": 1000,
    **dict.fromkeys(("decode_ms_median", "decode_ms_p10", "decode_ms_p90", "decode_tokens_per_s", "ttft_ms"), 1.0),
    **dict.fromkeys(("prefill_tokens_per_s", "floor_ms", "floor_share", "bandwidth_gb_per_s"), 1.0),
}  # fmt: skip


@torch.no_grad()
def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm of `theirs`, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@torch.inference_mode()
def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """The logits of halve's model."""
    return load_model(folder)(tokens)


@torch.inference_mode()
def their_logits(folder: Path, **options: object) -> torch.Tensor:
    """The logits of transformers' model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)(TOKENS).logits


def full_weight(linear: Linear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [O, I] of a layer that keeps all its channels and computes the same: zeros where they were removed."""
    full = torch.zeros(linear.out_features, linear.in_features, dtype=dtype)
    rows = torch.arange(linear.out_features) if linear.output_index is None else linear.output_index
    columns = torch.arange(linear.in_features) if linear.input_index is None else linear.input_index
    full[rows.unsqueeze(1), columns] = linear.dense_weight(dtype)
    return full


def write_word_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Give the model in `folder` a tokenizer whose tokens are <unk>, <s>, </s> and then `words`, split at spaces.

    It puts <s> before a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_text(rng: random.Random, longest: int = 25) -> str:
    """Characters of one to four bytes: letters, spaces and controls, Chinese, Japanese, Hindi, Arabic, emoji, U+FFFD."""
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x4E00, 0xA000), (0x3040, 0x3100), (0x900, 0x980), (0x600, 0x700)]
    ranges += [(0x1F300, 0x1FB00), (9, 14), (0xFFFD, 0xFFFE)]
    letters = (chr(rng.randrange(*rng.choice(ranges))) if rng.random() < 0.8 else " " for _ in range(longest))
    return "".join(letters)[: rng.randint(0, longest)]


COMPANIONS = (
    "generation_config.json tokenizer.json tokenizer.model tekken.json chat_template.jinja "
    "additional_chat_templates/tools.jinja LICENSE LICENSE.txt LICENSE-MODEL NOTICE USE_POLICY.md"
).split()


def add_companions(folder: Path) -> None:
    """Give a model what goes with weights, and what does not."""
    for name in (
        *COMPANIONS,
        "README.md",
        "notes.txt",
        "original/tokenizer.model",
        "additional_chat_templates/notes.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"text of {name}")


def companions(folder: Path) -> dict[str, str]:
    """The texts of a folder by name, weights and configs left out."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    left_out = ("config.json", "model.safetensors", "model-", "pytorch_model", "halve")
    return {name: path.read_text() for name, path in files.items() if not name.startswith(left_out)}


def write_lines(path: Path, *records: Any) -> Path:
    """A JSON-lines file of `records`."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# what stands for a value in the text of a JSON file, because Python does not write it
RAW = {
    "@deep": "[" * 3000 + "]" * 3000,
    "@huge": "1" + "0" * 400,
    "@longest": "9" * 5000,
    "@nan": "NaN",
    "@big": "1e400",
}


def raw_json(value: Any) -> str:
    """`value` as JSON, the names of RAW as what they stand for."""
    text = json.dumps(value, default=str)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text
