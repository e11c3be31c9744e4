"""What tensors a model of a family has: every linear, norm and table, by its Hugging Face name, with its shape."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from halve.model.config import ModelConfig
from halve.model.family import Family
from halve.model.wiring import ATTENTION, HEAD_NORMS, SUBLAYERS, wires

TABLE = "embed"  # role of the embedding


@dataclass(frozen=True)
class LinearShape:
    """One linear of the model: its Hugging Face name, its role in the block and its full widths."""

    name: str
    role: str
    layer: int | None
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class NormShape:
    """One norm of the model: its Hugging Face name, its role, how many numbers it takes, and its kind (rms or layer)."""

    name: str
    role: str
    size: int
    kind: str


def parameters(config: ModelConfig) -> int:
    """Weights of the model's matrices."""
    tables = config.vocab_size * (config.embed_size or config.hidden_size) * (1 if config.tied else 2)
    if not config.ropes:
        tables += (config.max_positions + config.position_offset) * config.hidden_size
    return tables + sum(
        wire.outputs(config, layer) * wire.inputs(config, layer) * count
        for layer, count in Counter(config.layers).items()
        for wire in wires(config, layer)
    )


def block_linears(family: Family, config: ModelConfig, index: int) -> list[LinearShape]:
    """The linears of one layer in the order they run."""
    layer = config.layers[index]
    return [
        LinearShape(
            family.block_name(index, wire.role),
            wire.role,
            index,
            wire.outputs(config, layer),
            wire.inputs(config, layer),
            getattr(config, wire.bias),
        )
        for wire in wires(config, layer)
    ]


def block_norms(family: Family, config: ModelConfig, index: int) -> list[NormShape]:
    """The norms of one layer: those around each sublayer, and where a model has them those over heads."""
    layer, norms = config.layers[index], []
    for sublayer in SUBLAYERS.values():
        if not sublayer.units(layer):
            continue
        around = {sublayer.norm: config.norm_input or config.norm_sum, sublayer.output_norm: config.norm_output}
        norms += [
            NormShape(family.block_name(index, role), role, config.hidden_size, config.norm)
            for role, there in around.items()
            if there
        ]
        if config.qk_norm and sublayer is ATTENTION:
            heads = (layer.num_heads, layer.num_kv_heads) if config.qk_norm_whole else (1, 1)
            sizes = dict(zip(HEAD_NORMS, (config.head_dim * count for count in heads), strict=True))
            norms += [NormShape(family.block_name(index, role), role, size, "rms") for role, size in sizes.items()]
    return norms


def final_norm(family: Family, config: ModelConfig) -> NormShape | None:
    """The norm between the last block and the head, None where a model has none."""
    if not config.final_norm:
        return None
    return NormShape(family.names["final_norm"], "final_norm", config.hidden_size, config.norm)


def table_linear(family: Family, config: ModelConfig) -> LinearShape:
    """The embedding: a row for each token. Where it is tied, the output head multiplies by it as well."""
    width = config.embed_size or config.hidden_size
    return LinearShape(family.names[TABLE], TABLE, None, config.vocab_size, width, False)


def head_linear(family: Family, config: ModelConfig) -> LinearShape:
    """The output head."""
    return replace(table_linear(family, config), name=family.names["head"], role="head")


def projection_linears(family: Family, config: ModelConfig) -> list[LinearShape]:
    """OPT-350m's projections between embedding and hidden size; never compressed."""
    if not config.embed_size:
        return []
    hidden, embed = config.hidden_size, config.embed_size
    return [
        LinearShape(family.names["project_in"], "project_in", None, hidden, embed, False),
        LinearShape(family.names["project_out"], "project_out", None, embed, hidden, False),
    ]


def vector_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not part of a linear or the embedding: positions, norms."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not config.ropes:
        rows = config.max_positions + config.position_offset
        shapes[f"{family.names['positions']}.weight"] = (rows, config.hidden_size)
    final = final_norm(family, config)
    norms = [] if final is None else [final]
    for index in range(len(config.layers)):
        norms += block_norms(family, config, index)
    for norm in norms if config.norm_affine else ():
        parts = ("weight", "bias") if norm.kind == "layer" else ("weight",)
        shapes |= {f"{norm.name}.{part}": (norm.size,) for part in parts}
    return shapes
