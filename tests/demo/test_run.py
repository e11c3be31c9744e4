"""The demo's parts that need no minutes; `make demo` itself is run by .ci/run."""

from __future__ import annotations

from pathlib import Path

import pytest

from halve.checkpoint.reader import open_checkpoint
from halve.compression.compress import Request, plan_recipe
from halve.compression.recipe import as_steps
from halve.demo.run import EXAMS, READER, VARIANTS, demo
from halve.errors import OutputError


def test_every_variant_can_be_applied_to_the_bundled_model(tmp_path: Path) -> None:
    for variant in VARIANTS:
        plan = plan_recipe(Request(str(READER), tmp_path / "out", as_steps(variant.steps)))
        assert plan.bytes_after < plan.bytes_before


def test_the_bundled_model_is_small_deep_and_whole() -> None:
    checkpoint = open_checkpoint(READER)
    config = checkpoint.config
    assert len(config.layers) >= 6 and config.layers[0].num_kv_heads >= 4 and config.head_dim in (32, 64)
    assert config.tied and config.hidden_size % 128 == 0 and config.layers[0].intermediate_size % 128 == 0
    assert (READER / "model.safetensors").stat().st_size <= 16_000_000
    assert all(Path(exam.options.data or "").is_file() for exam in EXAMS)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(OutputError, match="not empty"):
        demo(tmp_path)
    assert (tmp_path / "precious").exists()
