"""Compressed models of a published shape with random weights, built in seconds: speed does not depend on the values.

Shapes, widths and formats are those that the recipe in `Variant.recipe` gives; codes are drawn instead of computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from kernels_cpu import make_weight

from halve.compression.methods.allocation import rounded_width
from halve.model.config import LayerConfig
from halve.model.decoder import Block, Model
from halve.model.linear import Linear
from halve.model.merge import merge_siblings
from halve.model.wiring import MLP, wires
from halve.quantization import QuantSpec

INT8, INT4 = QuantSpec(8, -1), QuantSpec(4, 128)


@dataclass(frozen=True)
class Variant:
    """What becomes of a dense model: `spec` packs every linear, `head` the head, and with `table` the embedding in one with
    it; shares of what is removed."""

    title: str
    recipe: tuple[str, ...] = ()
    spec: QuantSpec | None = None
    head: QuantSpec | None = None
    table: bool = False
    inputs: float = 0.0
    mlp: float = 0.0
    layers: float = 0.0


_HEAD = "rtn:bits=8,targets=lm_head,untie=true"
VARIANTS = {
    "bf16": Variant("bf16"),
    "int8": Variant("int8, int8 head", ("rtn:bits=8", _HEAD), INT8, INT8),
    "int4": Variant("int4 g128, int8 head", ("rtn:bits=4,group_size=128", _HEAD), INT4, INT8),
    "int4-table": Variant(
        "int4 g128, int8 table",
        ("rtn:bits=4,group_size=128", "rtn:bits=8,targets=embed_tokens"),
        INT4,
        INT8,
        table=True,
    ),
    "int8-l1-inputs": Variant(
        "l1-inputs 35 %, int8, int8 head", ("l1-inputs:fraction=0.35", "rtn:bits=8", _HEAD), INT8, INT8, inputs=0.35
    ),
    "int4-prune-mlp": Variant(
        "prune-mlp 30 %, int4 g128, int8 head",
        ("prune-mlp:fraction=0.3,multiple_of=128", "rtn:bits=4,group_size=128", _HEAD),
        INT4,
        INT8,
        mlp=0.3,
    ),
    "int8-drop-layers": Variant(
        "drop-layers 25 %, int8, int8 head", ("drop-layers:count=4", "rtn:bits=8", _HEAD), INT8, INT8, layers=0.25
    ),
}


def build(dense: Model, variant: Variant) -> Model:
    """The variant of a dense bfloat16 model; norms and the embedding are shared with it."""
    if variant.spec is None:
        return dense
    width = dense.config.layers[0].intermediate_size
    if variant.mlp:
        width = rounded_width("prune-mlp", width, variant.mlp, 128, "channel")
    if variant.inputs:
        width = _kept(width, variant.inputs)  # inputs that down_proj drops narrow the MLP
    count = round(len(dense.blocks) * (1 - variant.layers))
    layer = replace(dense.config.layers[0], intermediate_size=width)
    config = replace(dense.config, layers=(layer,) * count, tied=variant.table)
    blocks = [_block(block, index, config, layer, variant) for index, block in enumerate(list(dense.blocks)[:count])]
    head = _linear(config.vocab_size, config.hidden_size, variant.head, 0.0)
    model = Model(config, dense.dtype, head if variant.table else dense.table, blocks, dense.final_norm, head)
    for _, linear in model.linears():
        linear.select_backend("auto", torch.bfloat16)
    return model


def _kept(columns: int, fraction: float) -> int:
    return columns - int(columns * fraction)


def _block(dense: Any, index: int, config: Any, layer: LayerConfig, variant: Variant) -> Block:
    linears = {}
    for wire in wires(config, layer):
        dropped = 0.0 if wire.role == MLP.writer else variant.inputs
        linears[wire.role] = _linear(wire.outputs(config, layer), wire.inputs(config, layer), variant.spec, dropped)
    block = Block(config, layer, index, linears, dict(dense.norms.items()))
    merge_siblings(block)
    return block


def _linear(rows: int, columns: int, spec: QuantSpec | None, dropped: float) -> Linear:
    kept = _kept(columns, dropped)
    weight = make_weight(torch.bfloat16 if spec is None else spec, kept, rows)
    index = torch.randperm(columns)[:kept].sort().values if dropped else None
    return Linear(weight, input_index=index, in_features=columns)
