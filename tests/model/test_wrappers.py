"""Models that hold one of a family, or are one under another name: read as that, written as that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from halve import compress, load_model
from halve.errors import UnsupportedModelError
from halve.model.wrappers import own_config
from tests.common import GEMMA, MINISTRAL3_ROPE, TOKENS, logits, relative, their_logits

TEXT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
TEXT |= GEMMA | {"num_key_value_heads": 2, "sliding_window_pattern": 2, "final_logit_softcapping": 1.5}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
IMAGES = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}


@pytest.fixture(scope="module")
def make_wrapped(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A model with a tower, and the logits that transformers computes of text with it."""

    def make(**options: Any) -> tuple[Path, torch.Tensor]:
        kind: Any = CONFIG_MAPPING["gemma3"]
        config = kind(text_config=TEXT, vision_config=VISION, **IMAGES, **options)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        folder = tmp_path_factory.mktemp("wrapped")
        model.save_pretrained(folder)
        with torch.inference_mode():
            return folder, model(TOKENS).logits

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_either_layout(make_wrapped, tmp_path: Path, tied: bool, layout: str) -> None:
    folder, theirs = make_wrapped(tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    if layout == "model.language_model.":
        moved = {"language_model.model.": layout, "language_model.lm_head": "lm_head", "vision": "model.vision"}
        for old, new in (moved | {"multi_modal": "model.multi_modal"}).items():
            tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    assert any(name.startswith(layout) for name in tensors)
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    (wrapped / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, wrapped / "model.safetensors", metadata={"format": "pt"})
    assert relative(logits(wrapped), theirs) < 1e-5
    compress(wrapped, tmp_path / "out", ["drop-layers:layers=1"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert "vision_config" not in written and written["tie_word_embeddings"] == tied
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


def test_what_published_configs_leave_out_is_what_transformers_takes(tmp_path: Path) -> None:
    """Those of Gemma 3 name only what differs from the defaults of the config class."""
    said = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "intermediate_size": 32}
    text = said | {"vocab_size": 50, "sliding_window": 4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    raw = own_config({"model_type": "gemma3", "text_config": text}, "config.json")
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["gemma3_text"](**{k: v for k, v in raw.items() if k != "model_type"})
    )
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    (alone / "config.json").write_text((tmp_path / "config.json").read_text())
    tokens = TOKENS % 50
    with torch.inference_mode():
        assert relative(load_model(alone)(tokens), model.eval()(tokens).logits) < 1e-5


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
SECTIONS = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
DEEP = {"depth": 1, "num_heads": 2, "intermediate_size": 16, "patch_size": 14}
# the type, its text part, its other options, and what the text part is written as
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "qwen2_vl": (
        "qwen2_vl",
        SMALL | {"rope_parameters": SECTIONS},
        {"vision_config": DEEP | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1}},
        "qwen2",
    ),
    "qwen2_vl-sliding": (
        "qwen2_vl",
        SMALL | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": SECTIONS},
        {"vision_config": DEEP | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1}},
        "qwen2",
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        SMALL | {"rope_parameters": YARN | {"mrope_section": [2, 1, 1]}},
        {"vision_config": DEEP | {"hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0]}},
        "qwen2",
    ),
    "qwen3_vl": (
        "qwen3_vl",
        SMALL | {"head_dim": 16, "rope_parameters": SECTIONS | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        {
            "vision_config": DEEP
            | {"hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        },
        "qwen3",
    ),
    "mistral3": (
        "mistral3",
        SMALL | {"model_type": "mistral", "head_dim": 16, "sliding_window": 7},
        {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False},
        "mistral",
    ),
    "mistral3-ministral3": (
        "mistral3",
        SMALL | {"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL3_ROPE},
        {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
        "ministral3",
    ),
    "internvl": (
        "internvl",
        SMALL | {"model_type": "qwen3", "head_dim": 16},
        {"vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]}},
        "qwen3",
    ),
    "llava": (
        "llava",
        SMALL | {"model_type": "llama", "tie_word_embeddings": True},
        {"vision_config": VISION | {"model_type": "clip_vision_model"}},
        "llama",
    ),
    "llava_next": (
        "llava_next",
        SMALL | {"model_type": "mistral"},
        {"vision_config": VISION | {"model_type": "clip_vision_model"}},
        "mistral",
    ),
    "llava_onevision": (
        "llava_onevision",
        SMALL | {"model_type": "qwen2"},
        {"vision_config": VISION | {"model_type": "siglip_vision_model"}},
        "qwen2",
    ),
    "idefics3": ("idefics3", SMALL | {"model_type": "llama"}, {"vision_config": VISION}, "llama"),
    "smolvlm": ("smolvlm", SMALL | {"model_type": "llama"}, {"vision_config": VISION}, "llama"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_text_parts_compute_what_the_whole_computes_of_text(tmp_path: Path, name: str) -> None:
    """For those whose rotary embedding also goes by places in a picture, of text alone it is the ordinary one."""
    kind, text, options, written_as = WRAPPED[name]
    config_class: Any = CONFIG_MAPPING[kind]
    config = config_class(text_config=text, **options)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path / "whole")
    tokens = TOKENS % 90  # not those that stand for pictures
    with torch.inference_mode():
        theirs = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert relative(logits(tmp_path / "whole", tokens), theirs) < 1e-5
    compress(tmp_path / "whole", tmp_path / "out", ["drop-layers:layers=1"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == written_as and "vision_config" not in written and "mrope" not in json.dumps(written)
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5


def test_the_flat_config_of_older_models_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Of Qwen2-VL as published, with the tensors of text under the names of Qwen2."""
    _, text, options, _ = WRAPPED["qwen2_vl"]
    flat = {key: value for key, value in text.items() if key != "rope_parameters"} | {"model_type": "qwen2_vl"}
    flat |= options | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 50.0}
    flat |= {"tie_word_embeddings": True}
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(flat))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    old = {"model.language_model.": "model.", "model.visual.": "visual."}
    tensors = {}
    for name, tensor in model.state_dict().items():
        start = next((prefix for prefix in old if name.startswith(prefix)), None)
        if name != "lm_head.weight":
            tensors[name if start is None else old[start] + name.removeprefix(start)] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        assert relative(logits(folder, TOKENS % 90), model(TOKENS % 90).logits) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_sizes_that_a_text_part_leaves_out_are_the_defaults_of_its_type(kind: str) -> None:
    raw = own_config({"model_type": "llava", "text_config": {"model_type": kind}}, "config.json")
    theirs = CONFIG_MAPPING[kind]().to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert {key: raw[key] for key in sizes} == {key: theirs[key] for key in sizes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"model_type": "llama"}}, "gemma3_text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "vision tower"),
    ],
)
def test_what_has_no_text_part_to_read_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        own_config({"model_type": "gemma3", "text_config": TEXT} | changes, "config.json")


PHI = {"pad_token_id": 0, "tie_word_embeddings": True}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "steps",
    [["rtn:bits=4,group_size=16"], ["prune-heads:fraction=0.5,score=l1,refit=false", "drop-layers:layers=1"]],
)
def test_phi3_is_a_mistral_whose_siblings_are_one_tensor(
    make_hf, tmp_path: Path, window: int | None, steps: list
) -> None:
    folder = make_hf("phi3", **PHI, sliding_window=window)
    assert relative(logits(folder), their_logits(folder)) < 1e-5
    compress(folder, tmp_path / "out", steps)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5
