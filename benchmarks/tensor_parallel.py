"""What every rank holds, reads and adds up of Llama-3.1-8B and 70B, by the formula that tests hold against measured bytes.

python benchmarks/tensor_parallel.py [--json benchmarks/results/tensor_parallel/formula.json]

The floor is the time that memory takes to give a rank what a decode step reads, at batch 1: nothing else is counted, neither
sums over ranks nor arithmetic. Beside it stand the tokens/s that the second system published for 8 ranks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.checkpoint.tensors import RandomTensors
from halve.compression.plan import state_of
from halve.compression.recipe import as_steps
from halve.measure.records import new_record, write_record
from halve.measure.speed.rank_bytes import rank_bytes
from halve.model import inventory

SHAPES = Path(__file__).parent / "shapes"
LIVE_TOKENS = 1024
BANDWIDTH_GB_PER_S = {"H100 SXM": 3350, "H200 SXM": 4800}  # of the data sheets
INT8 = "rtn:bits=8,targets=Linear|lm_head"
INT4 = ["rtn:bits=4,group_size=128", "rtn:bits=8,targets=lm_head"]
MODELS = {"Llama-3.1-8B": ("llama-3.1-8b", "21..26"), "Llama-3.1-70B": ("llama-3.1-70b", "56..71")}
# tokens/s of the second system on 8 ranks, by recipe: bf16, int8 weight-only, and that with the layers of MODELS removed
PUBLISHED = {
    ("Llama-3.1-8B", "bf16"): 310,
    ("Llama-3.1-8B", "int8"): 330,
    ("Llama-3.1-8B", "layers removed, int8"): 412,
    ("Llama-3.1-70B", "bf16"): 75,
    ("Llama-3.1-70B", "int8"): 101,
    ("Llama-3.1-70B", "layers removed, int8"): 124,
}


def planned(shape: str, steps: list[str]) -> Checkpoint:
    """The model that a recipe would leave, from the config alone."""
    checkpoint = open_checkpoint(SHAPES / shape, random_weights=True)
    state = state_of(checkpoint, torch.bfloat16)
    for method in as_steps(steps) if steps else ():
        state = method.plan(state).after
    vectors = inventory.vector_shapes(state.family, state.config)
    headers = {name: (size, torch.bfloat16) for name, size in vectors.items()}
    for stored in (state.table, *state.linears.values()):
        headers |= {f"{stored.name}.{part}": header for part, header in stored.parts(torch.bfloat16).items()}
    tensors = RandomTensors(headers)
    return replace(checkpoint, config=state.config, tensors=tensors, schemes=state.schemes)


def row(model: str, recipe: str, checkpoint: Checkpoint, ranks: int) -> dict[str, Any]:
    """The figures of one model on so many ranks; of ranks that differ, those of the largest."""
    most = max((rank_bytes(own, LIVE_TOKENS) for own in checkpoint.shares(ranks)), key=lambda one: one.held)
    floors = {name: (most.step + most.cache) / rate / 1e6 for name, rate in BANDWIDTH_GB_PER_S.items()}
    return {
        "row": f"{model}, {recipe}",
        "tp": ranks,
        "rank_bytes": most.held,
        "step_bytes": most.step + most.cache,
        "added_bytes": most.added if ranks > 1 else 0,
        "sums": most.sums if ranks > 1 else 0,
        "floor_ms": floors,
        "floor_tokens_per_s": {name: 1e3 / ms for name, ms in floors.items()},
        "published_tokens_per_s": PUBLISHED.get((model, recipe)) if ranks == 8 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tensor_parallel/formula.json"))
    target = parser.parse_args().json
    rows = []
    for model, (shape, removed) in MODELS.items():
        recipes = {
            "bf16": [],
            "int8": [INT8],
            "layers removed, int8": [f"drop-layers:layers={removed}", INT8],
            "int4 g128, int8 head": INT4,
        }
        for recipe, steps in recipes.items():
            checkpoint = planned(shape, steps)
            rows += [row(model, recipe, checkpoint, ranks) for ranks in (1, 2, 4, 8)]
    write_record(
        target,
        new_record(
            "tensor-parallel",
            "Llama-3.1-8B and 70B",
            command="python benchmarks/tensor_parallel.py",
            recipe=[],
            live_tokens=LIVE_TOKENS,
            bandwidth_gb_per_s=BANDWIDTH_GB_PER_S,
            rows=rows,
        ),
    )


if __name__ == "__main__":
    main()
