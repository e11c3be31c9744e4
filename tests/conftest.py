"""Shared fixtures: small real models of every family, and the real assets when they are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.tokenizer import Tokenizer
from halve.compression import compress as compression
from halve.compression.windows import Calibration
from tests.vocabularies import sentencepiece_folder, small_folder, tiktoken_folder

# read by Triton when it is imported: without a GPU its kernels run in its interpreter, on tensors of the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ASSETS = os.environ.get("HALVE_TEST_ASSETS")


@pytest.fixture(autouse=True)
def environment_put_back() -> Iterator[None]:
    """Programs run in a test's process may set what later tests read, such as whether Triton interprets."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts; tests that use it skip, with this reason, where it is not."""
    if not ASSETS:
        pytest.skip("HALVE_TEST_ASSETS is not set: no real models and texts to test on")
    path = Path(ASSETS)
    # a set but wrong path must not turn into a silent skip
    assert (path / "models" / "stories260K" / "config.json").is_file(), f"HALVE_TEST_ASSETS={path} holds no assets"
    return path


VOCABULARIES = {"llama2": sentencepiece_folder, "mistral-v3": sentencepiece_folder, "llama3-tiktoken": tiktoken_folder}


@pytest.fixture(scope="session", params=["small", "stories260K", "babyllama-tok361", *VOCABULARIES])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizers that spell what they have no token for in bytes: a small one and those of real vocabularies."""
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "small":
        return Tokenizer(small_folder(folder))
    real: Path = request.getfixturevalue("assets")
    if request.param not in VOCABULARIES:
        return Tokenizer(real / "models" / request.param)
    return Tokenizer(VOCABULARIES[request.param](real / "tokenizers" / request.param / "tokenizer.model", folder))


@pytest.fixture(scope="session")
def make_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a small random Hugging Face model of `model_type` with `options` and save it; returns its folder."""

    def make(model_type: str, seed: int = 0, **options: Any) -> Path:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        small: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
        if model_type == "opt":
            small |= {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
        else:
            small |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = CONFIG_MAPPING[model_type](**(small | options))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # biases and norms start at 0 and 1: a decoder that forgot them would pass
                if parameter.dim() == 1:
                    parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
                else:
                    parameter.normal_(0.0, 0.2)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def drawn_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in place of text: for tests to which it does not matter what is calibrated on."""
    windows = torch.randint(0, 97, (5, 32), generator=torch.Generator().manual_seed(1))
    drawn = Calibration(windows[:4], windows[4:], {"windows": 4, "windows_asked": 4})
    monkeypatch.setattr(compression, "read_documents", lambda _: ["drawn"])
    monkeypatch.setattr(compression, "_windows", lambda *_: drawn)
