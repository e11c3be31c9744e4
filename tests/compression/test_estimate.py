"""Estimates of memory and time: checked against counts done by hand."""

from __future__ import annotations

import torch

from halve.checkpoint.reader import open_checkpoint
from halve.compression.compress import Request, plan_recipe
from halve.compression.estimate import estimate
from halve.compression.plan import state_of
from halve.compression.recipe import as_steps
from halve.compression.windows import CalibrationOptions


def test_memory_by_hand(make_hf) -> None:
    """Hidden 32, MLP 48, 4 query and 2 key/value heads of 8: a block has 32*32*2 + 32*16*2 + 3*32*48 = 7,680 weights."""
    state = state_of(open_checkpoint(make_hf("llama")), torch.float32)
    plain = estimate([(state, 0)], 1000, 4, "cpu")
    assert plain.memory_bytes == 7680 * 4  # above the embedding's 97 * 32
    calibrated = estimate([(state, 1)], 1000, 4, "cpu")
    states, held, hessians, solved = 1000 * 32 * 4, 1000 * 48 * 4, 3 * 4 * 48 * 48, 7680 * 4
    assert calibrated.memory_bytes == 7680 * 4 + states + held + hessians + solved
    assert calibrated.seconds > plain.seconds > 0
    aiming = estimate([(state, 2)], 1000, 4, "cpu")  # states and block again, and 2/N Y^T (goal) of down_proj
    assert aiming.memory_bytes - calibrated.memory_bytes == states + 7680 * 4 + 4 * 48 * 32
    assert aiming.seconds > calibrated.seconds
    # of an embedding that is quantized, codes and words beside it, a byte a weight each, and four copies in float32
    assert estimate([(state, 0)], 1000, 4, "cpu", 97 * 32).memory_bytes == plain.memory_bytes + 18 * 97 * 32


def test_the_plan_carries_it(make_hf, tmp_path) -> None:
    steps = as_steps(["gptq:bits=4,group_size=16"])
    short = plan_recipe(Request(str(make_hf("llama")), tmp_path / "o", steps, CalibrationOptions(samples=8, window=16)))
    long = plan_recipe(
        Request(str(make_hf("llama")), tmp_path / "o", steps, CalibrationOptions(samples=800, window=64))
    )
    assert long.estimate.memory_bytes > short.estimate.memory_bytes
