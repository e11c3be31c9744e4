"""llama.cpp computes of an exported file what we compute of the model: where its Python (HALVE_TEST_LLAMA_CPP) is named."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halve import export
from halve.checkpoint.tokenizer import Tokenizer
from tests.checkpoint.test_gguf_export import PRUNED, WRITTEN, quantized
from tests.common import TOKENS, logits, relative

PEER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "llama_cpp_logits.py"
PYTHON = os.environ.get("HALVE_TEST_LLAMA_CPP")
pytestmark = pytest.mark.skipif(not PYTHON, reason="HALVE_TEST_LLAMA_CPP is not set: no Python with llama-cpp-python")


def llama_cpp(file: Path, work: Path, tokens: torch.Tensor, text: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
    request = {"file": str(file), "text": text, "tokens": tokens.tolist(), "out": str(work / "l.npy"), "threads": 1}
    (work / "request.json").write_text(json.dumps(request))
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(PYTHON), str(PEER), str(work / "request.json")], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(work / "l.npy")), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WRITTEN)
def test_every_family(name: str, make_hf, tmp_path: Path) -> None:
    """In float32 to the rounding of sums; Gemma's GELU is a table of float16 there, 2^-11 of each value at most."""
    kind, options = WRITTEN[name]
    folder = make_hf(kind, **options)
    export(folder, tmp_path / "m.gguf", to="gguf")
    theirs, _ = llama_cpp(tmp_path / "m.gguf", tmp_path, TOKENS[0])
    assert relative(theirs, logits(folder)[0]) < (2e-3 if name.startswith("gemma") else 1e-5)


@pytest.mark.parametrize("step", PRUNED)
def test_pruned_models(step: str, make_hf, tmp_path: Path) -> None:
    kind, options = WRITTEN["llama-biases"]
    q = quantized(make_hf(kind, **options), tmp_path / "q", step, dtype=None)
    export(q, tmp_path / "m.gguf", to="gguf")
    theirs, _ = llama_cpp(tmp_path / "m.gguf", tmp_path, TOKENS[0])
    assert relative(theirs, logits(q)[0]) < 1e-5


def test_tokens(any_tokenizer: Tokenizer, make_hf, tmp_path: Path) -> None:
    folder = make_hf("llama", vocab_size=len(any_tokenizer.inner))
    for path in any_tokenizer.folder.iterdir():
        if path.name.startswith("tokenizer"):
            (folder / path.name).write_bytes(path.read_bytes())
    export(folder, tmp_path / "m.gguf", to="gguf")
    text = "The quick brown fox, 12345 times.\n\n  It's  done! 中文 🙂 ünïcode\t\tDON'T  "
    _, said = llama_cpp(tmp_path / "m.gguf", tmp_path, TOKENS[0][:1], text)
    assert said["tokens"] == any_tokenizer.encode(text, bos=True)
