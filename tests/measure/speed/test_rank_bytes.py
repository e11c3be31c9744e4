"""The formula of bytes against what ranks really read, hold and add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halve.checkpoint.reader import load_model, open_checkpoint
from halve.compression.compress import compress
from halve.decode.generate import Decoder
from halve.decode.sampling import Sampling
from halve.measure.speed.rank_bytes import rank_bytes
from halve.measure.speed.timing import kv_bytes_per_step
from halve.ranks.collective import Ranks
from tests.ranks.processes import on_ranks


def measured(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The bytes of a loaded model, and those of every sum of one decode step."""
    model = load_model(folder, ranks=ranks, backend="reference")  # which keeps packed weights as they are stored
    decoder = Decoder(model, [[1, 2, 3]], 8, Sampling())
    token = decoder.prefill()
    added: list[int] = []
    add = ranks.add

    def counted(x: Tensor) -> Tensor:
        added.append(x.nbytes)
        return add(x)

    ranks.add = counted
    decoder.step(token)
    return {
        "read": model.read_bytes,
        "held": model.weight_bytes(),
        "step": model.step_bytes(),
        "cache": kv_bytes_per_step(model, 4),
        "added": sum(added),
        "sums": len(added),
    }


@pytest.mark.parametrize(
    ("family", "options", "steps", "ranks"),
    [
        ("llama", {"tie_word_embeddings": False}, [], 2),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}, [], 4),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, [], 2),
        ("qwen3", {"head_dim": 16}, ["rtn:bits=8,targets=Linear|lm_head"], 2),
        ("llama", {}, ["rtn:bits=4,group_size=16", "drop-mlp:layers=1"], 2),
        ("gemma2", {"head_dim": 16, "sliding_window": 3}, ["drop-attention:layers=0"], 2),
        ("gemma2", {"head_dim": 16}, ["rtn:bits=4,group_size=16,targets=embed_tokens"], 4),
        ("llama", {}, ["rtn:bits=3,group_size=8,symmetric=false,targets=Linear|lm_head|Embedding"], 2),
        ("llama", {}, ["rtn:bits=8,symmetric=false,targets=Embedding"], 4),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, ["rtn:bits=2,targets=Embedding"], 2),
    ],
)
def test_the_formula_gives_the_measured_bytes(
    make_hf: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], steps: list[str], ranks: int
) -> None:
    folder = make_hf(family, **options)
    if steps:
        folder = compress(folder, tmp_path / "out", steps).out
    planned = [vars(rank_bytes(own, 4)) for own in open_checkpoint(folder).shares(ranks)]
    assert on_ranks(ranks, measured, folder) == planned


def test_a_vocabulary_that_does_not_divide(make_hf: Callable[..., Path]) -> None:
    """97 tokens on two ranks: 48 and 49 rows of 32 numbers."""
    first, second = (rank_bytes(own, 1) for own in open_checkpoint(make_hf("llama")).shares(2))
    assert second.held - first.held == 2 * 32 * torch.float32.itemsize
