"""The main job on a real language model: converted, quantized, compared with itself, all within minutes on two cores.

`HALVE_TEST_GEMMA` names a folder with gemma-3-270m.gguf. Its weights lie on the grids of its own quantized types: these
tests say that the job works, not how good a method is.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import halve


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense bfloat16 folder, converted by a process of its own that says how much memory it needed."""
    if not (place := os.environ.get("HALVE_TEST_GEMMA")):
        pytest.skip("HALVE_TEST_GEMMA is not set: no folder with gemma-3-270m.gguf")
    out = tmp_path_factory.mktemp("gemma") / "gemma"
    # the high water mark of this process's own memory: what getrusage says is that of the parent too, where it was larger
    script = (
        "import re, sys; from pathlib import Path; from halve import convert; convert(*sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", script, str(Path(place) / "gemma-3-270m.gguf"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (out.parent / "peak").write_text(done.stdout.split()[-1])
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (assets := os.environ.get("HALVE_TEST_ASSETS")):
        pytest.skip("HALVE_TEST_ASSETS is not set: no text")
    return Path(assets) / "data"


def test_converting_needs_little_memory(gemma: Path) -> None:
    assert int((gemma.parent / "peak").read_text()) * 1024 < 1e9


def perplexity(model: Path, data: Path, **options: Any) -> dict[str, Any]:
    return halve.evaluate(model, task="perplexity", data=data / "wikitext2_test.raw", window=512, limit=3, **options)


def test_it_speaks(gemma: Path) -> None:
    model, tokenizer = halve.load_model(gemma), halve.load_tokenizer(gemma)
    [made] = halve.generate_text(model, tokenizer, "Monday, Tuesday, Wednesday, Thursday,", max_new_tokens=8)
    assert "Friday, Saturday, Sunday" in made.text


@pytest.fixture(scope="module")
def dense(gemma: Path, text: Path) -> dict[str, Any]:
    return perplexity(gemma, text, save_base=gemma.parent / "text.base")


def test_each_window_of_a_text_begins_with_bos(dense: dict[str, Any]) -> None:
    """Without one this model's loss is a nat higher, see `joined` in docs/evaluation.md; transformers' here is 3.2."""
    assert dense["bos_ids"] == [2] and dense["tokens"] == 3 * 511
    assert 2.8 < dense["nll_nats_per_token"] < 3.6


@pytest.mark.parametrize(
    ("step", "least", "most"), [("rtn:bits=8", 1e-5, 0.02), ("gptq:bits=4,group_size=128", 0.02, 0.6)]
)
def test_quantized(
    step: str, least: float, most: float, gemma: Path, dense: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    halve.compress(gemma, tmp_path / "out", [step], calibration=text / "c4_sample_1000.jsonl", samples=8, window=256)
    record = perplexity(tmp_path / "out", text, base=gemma.parent / "text.base")
    assert least < record["kl_nats_per_token"] < most
    assert record["base_nll_nats_per_token"] == pytest.approx(dense["nll_nats_per_token"], abs=1e-4)
    ratio = math.exp(record["nll_nats_per_token"] - dense["nll_nats_per_token"])
    assert record["perplexity_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert json.loads((tmp_path / "out" / "halve.json").read_text())["recipe"]
