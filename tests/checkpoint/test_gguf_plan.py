"""What a GGUF file has a place for, found from headers alone: the rest is refused with the field or the recipe at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halve import compress, export
from halve.checkpoint.tensors import SafetensorsFolder
from halve.errors import HalveError, RecipeError, UnsupportedModelError
from tests.checkpoint.test_gguf import GEMMA, WIDE
from tests.checkpoint.test_gguf_export import LLAMA3, check_codes
from tests.checkpoint.test_gptq_format import to_gptq

REFUSED: dict[str, tuple[str, list[str], str]] = {
    "another family": ("arcee", [], "model_type='arcee' is not written as GGUF: models of llama, mistral"),
    "widths of qwen": (
        "qwen3",
        ["prune-mlp:widths=32|64|96,score=l1,refit=false,multiple_of=32"],
        "allocation=uniform",
    ),
    "no mlp": ("llama", ["drop-mlp:layers=1"], "layer 1 has no MLP"),
    "no first attention": ("llama", ["drop-attention:layers=0"], "layer 0 has no attention"),
    "heads of qwen 2": ("qwen2", ["prune-heads:fraction=0.5,score=l1,refit=false"], "2 heads of 16 are not as wide"),
    "small groups": ("llama", ["rtn:bits=4,group_size=16"], r"groups of 16 columns.*20 more.*bits=4,group_size=64"),
    "zero points": ("llama", ["rtn:bits=8,symmetric=false"], "8-bit codes with zero points.*bits=8,symmetric=true"),
    "kept inputs": ("llama", ["l1-inputs:fraction=0.35"], "some of its channels by an index.*prune-mlp"),
    "kept outputs": ("llama", ["l1-outputs:fraction=0.1"], "some of its channels by an index"),
    "widths of 32": (
        "llama",
        ["rtn:bits=8", "prune-mlp:fraction=0.1,score=l1,refit=false,multiple_of=1"],
        r"down_proj has rows of 86 codes, no multiple of 32.*ignore=down_proj",
    ),
    "ragged groups": (
        "llama",
        ["rtn:bits=4,group_size=32", "prune-mlp:fraction=0.3,score=l1,refit=false,multiple_of=32"],
        "groups change inside blocks of 32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_does_not_hold_is_refused_before_weights(
    name: str, make_hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, steps, words = REFUSED[name]
    folder = make_hf(kind, **WIDE)
    q = tmp_path / "q" if steps else folder
    if steps:
        compress(folder, q, steps, dtype=torch.bfloat16)
    read = SafetensorsFolder.get

    def get(self: SafetensorsFolder, name: str) -> torch.Tensor:
        assert not name.endswith((".weight", "weight_packed", "weight_scale")), name
        return read(self, name)

    monkeypatch.setattr(SafetensorsFolder, "get", get)
    with pytest.raises(HalveError, match=words) as error:
        export(q, tmp_path / "m.gguf", to="gguf")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.gguf"))


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"sliding_window": 16}, "layer 0 has sliding_window=16, which a GGUF file of llama cannot say"),
    "windows of qwen": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "layer 1 has"),
    "activation": ("llama", {"hidden_act": "gelu"}, "activation='gelu'"),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "kind='yarn'"),
    "bands": ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
    "biases": ("qwen3", {"attention_bias": True}, r"has biases \(qkv_bias\) that llama.cpp does not read of qwen3"),
    "scale": ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 24}, "attention_scale="),
    "no caps": ("gemma2", GEMMA | {"attn_logit_softcapping": None}, "attention_cap=None would be read as 50.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_fields_cannot_say_is_refused(name: str, make_hf, tmp_path: Path) -> None:
    kind, options, words = CONFIGS[name]
    with pytest.raises(UnsupportedModelError, match=words) as error:
        export(make_hf(kind, **WIDE | options), tmp_path / "m.gguf", to="gguf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_window_as_long_as_the_context_is_none(make_hf, tmp_path: Path) -> None:
    export(make_hf("mistral", **WIDE, sliding_window=64), tmp_path / "m.gguf", to="gguf")


def test_gptq_folders(make_hf, tmp_path: Path) -> None:
    """Codes of another tool, in its scales of float16, as they are; not where an order of columns has mixed the groups."""
    source = make_hf("llama", **WIDE)
    plain = to_gptq(source, tmp_path / "plain", "gptq", group=32, sym=True)
    made = export(plain, tmp_path / "m.gguf", to="gguf")
    assert made.types["Q4_0"] == 21 and made.rounding == "codes and scales as they were"
    check_codes(plain, tmp_path / "m.gguf", tmp_path / "out")
    mixed = to_gptq(source, tmp_path / "mixed", "gptq", shuffle=True, group=32, sym=True)
    with pytest.raises(RecipeError, match="codes whose groups change inside blocks of 32 columns"):
        export(mixed, tmp_path / "mixed.gguf", to="gguf")
    again = export(mixed, tmp_path / "mixed.gguf", to="gguf", requantize="F16")
    assert again.rounding == "21 linears rounded again to F16"
