"""Whether a model has a place in a GGUF file, and in which types: all from headers, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.checkpoint.gguf_architecture import ARCHITECTURES, ROPE_FACTORS, WIDTHS
from halve.checkpoint.gguf_blocks import BLOCK, BY_NAME, type_of
from halve.checkpoint.gguf_config import hf_config
from halve.checkpoint.gguf_header import BlockType, GgufHeader, StoredTensor
from halve.checkpoint.reader import Checkpoint
from halve.checkpoint.stored import GROUP_INDEX, StoredLinear
from halve.errors import RecipeError, UnsupportedModelError, shown
from halve.model import families
from halve.model.config import LayerConfig, ModelConfig
from halve.model.inventory import LinearShape
from halve.model.rotary import RopeConfig, rope_frequencies
from halve.model.wrappers import own_config
from halve.quantization import fitting_group_sizes

DENSE = {torch.float32: BY_NAME["F32"], torch.float16: BY_NAME["F16"], torch.bfloat16: BY_NAME["BF16"]}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # that numbers are rounded to, with those of DENSE


@dataclass(frozen=True)
class PlannedLinear:
    """A linear, or the embedding, as the file will hold it. `again`: its codes or channels have no place, so the numbers
    they stand for are rounded to the type."""

    stored: StoredLinear
    type: BlockType
    again: bool = False


def architecture_for(checkpoint: Checkpoint) -> str:
    """The `general.architecture` that computes what the model does. Raises UnsupportedModelError where none does."""
    raw, config, origin = checkpoint.raw, checkpoint.config, checkpoint.folder
    kind = raw["halve_model_type"] if raw["model_type"] == "halve" else raw["model_type"]
    names = [name for name, architecture in ARCHITECTURES.items() if kind in architecture.written]
    if not names:
        known = ", ".join(dict.fromkeys(kind for one in ARCHITECTURES.values() for kind in one.written))
        raise UnsupportedModelError(f"{origin}: model_type={shown(kind)} is not written as GGUF: models of {known} are")
    if len({tuple(getattr(layer, number.ours) for number in WIDTHS) for layer in config.layers}) > 1:
        names = [name for name in names if ARCHITECTURES[name].by_layer]
        if not names:
            raise UnsupportedModelError(
                f"{origin}: its layers differ in width, which llama.cpp reads of Llama and Mistral alone and not of {kind}: "
                "prune with allocation=uniform, drop whole layers, or run it with halve"
            )
    bare = next((i for i, layer in enumerate(config.layers) if not layer.has_mlp), None)
    if bare is not None or not config.layers[0].has_attention:
        what = f"layer {bare} has no MLP" if bare is not None else "layer 0 has no attention"
        raise UnsupportedModelError(
            f"{origin}: {what}, which llama.cpp does not compute (of Llama, other layers than the first may lack attention): "
            "drop whole layers, or run it with halve"
        )
    _check_limits(checkpoint, names[0])
    return names[0]


def _check_limits(checkpoint: Checkpoint, name: str) -> None:
    architecture, config = ARCHITECTURES[name], checkpoint.config
    for bias in ("qkv_bias", "o_bias", "mlp_bias"):
        if getattr(config, bias) and bias not in architecture.biases:
            raise UnsupportedModelError(
                f"{checkpoint.folder}: has biases ({bias}) that llama.cpp does not read of {name}: run it with halve"
            )
    heads = config.layers[0].num_heads
    if architecture.square and heads * config.head_dim != config.hidden_size:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: {heads} heads of {config.head_dim} are not as wide as the model ({config.hidden_size}), as "
            f"llama.cpp takes for granted of {name}: keep all heads, or run it with halve"
        )


def linear_shapes(checkpoint: Checkpoint) -> list[LinearShape]:
    """The embedding, which is stored as a linear is, and every linear; a tied head is the embedding."""
    tied = checkpoint.config.tied
    return [checkpoint.table_shape, *(s for s in checkpoint.linear_shapes() if s.role != "head" or not tied)]


def plan_linears(
    checkpoint: Checkpoint, requantize: str | None, dtype: torch.dtype | None = None
) -> list[PlannedLinear]:
    """The type of each linear: dense ones in `dtype` (None: as stored), codes in the type that holds them as they are.

    What has no place is planned in the type `requantize`; RecipeError, with the recipe that would fit, where that is None.
    """
    planned, refused = [], []
    for shape in linear_shapes(checkpoint):
        stored = checkpoint.stored(shape)
        why = _why_not(stored, checkpoint)
        if why is None:
            kind = DENSE[dtype or stored.dtype or checkpoint.dtype] if stored.spec is None else type_of(stored.spec)
            assert kind is not None
            planned.append(PlannedLinear(stored, kind))
        elif requantize is None:
            refused.append((shape.name, *why))
        else:
            planned.append(_rounded(stored, BY_NAME[requantize], checkpoint))
    if refused:
        name, what, remedy = refused[0]
        more = f" (and {len(refused) - 1} more linears have no place)" if len(refused) > 1 else ""
        raise RecipeError(
            f"{checkpoint.folder}: {name} {what}, which GGUF does not hold{more}: {remedy}, or round it again with "
            "--requantize TYPE"
        )
    return planned


def _rounded(stored: StoredLinear, kind: BlockType, checkpoint: Checkpoint) -> PlannedLinear:
    if stored.shape.in_features % kind.size:
        raise RecipeError(
            f"{checkpoint.folder}: {stored.name} has {stored.shape.in_features} inputs, and {kind.name} is in blocks of "
            f"{kind.size}: use --requantize F16 or BF16"
        )
    return PlannedLinear(stored, kind, again=True)


def _why_not(stored: StoredLinear, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Why a linear has no place as it is, and the recipe that would fit; None where it has one."""
    spec, columns = stored.spec, stored.kept_in
    if not stored.whole:
        return "keeps some of its channels by an index", "prune with prune-mlp or prune-heads, which need none"
    if spec is None:
        return None
    if type_of(spec) is None:
        return "has 8-bit codes with zero points", "quantize with bits=8,symmetric=true"
    if columns % BLOCK:
        role = stored.name.rsplit(".", 1)[-1]
        return f"has rows of {columns} codes, no multiple of {BLOCK}", f"leave it dense (ignore={role} in the step)"
    bits = 8 if spec.bits == 8 else 4
    sizes = [size for size in fitting_group_sizes(columns, BLOCK) if size % BLOCK == 0 and size <= 128]
    fit = f"quantize with bits={bits},group_size={sizes[0]}"
    if stored.ragged:
        index = checkpoint.tensors.get(f"{stored.name}.{GROUP_INDEX}").view(-1, BLOCK)
        if bool((index != index[:, :1]).any()):
            return f"has codes whose groups change inside blocks of {BLOCK} columns", fit
        return None
    size = spec.columns_per_group(columns)
    return (f"has groups of {size} columns, no multiple of {BLOCK}", fit) if size % BLOCK else None


def check_read_back(
    checkpoint: Checkpoint,
    file_fields: dict[str, Any],
    tensors: Iterable[tuple[str, StoredTensor]],
    factors: Tensor | None,
) -> None:
    """UnsupportedModelError unless the file's fields and tensors, as `halve convert` reads them, are the same model."""
    header = GgufHeader(checkpoint.folder, file_fields, dict(tensors))

    def read(name: str) -> Tensor:
        assert name == ROPE_FACTORS and factors is not None
        return factors

    origin = str(checkpoint.folder)
    _, config = families.parse_config(own_config(hf_config(header, read), origin), origin)
    found = difference(checkpoint.config, config)
    if found is not None:
        name = file_fields["general.architecture"]
        raise UnsupportedModelError(
            f"{origin}: {found}, which a GGUF file of {name} cannot say: run it with halve, or change config.json if the model "
            "was trained without it"
        )


def difference(ours: ModelConfig, read: ModelConfig) -> str | None:
    """The first thing by which two models differ, in words; numbers as float32 holds them."""
    for one in fields(ModelConfig):
        mine, theirs = getattr(ours, one.name), getattr(read, one.name)
        if one.name == "layers":
            pairs = enumerate(zip(mine, theirs, strict=True))  # so many as the file's block_count
            found = next(filter(None, (_layer_difference(i, a, b, ours.max_positions) for i, (a, b) in pairs)), None)
            if found:
                return found
        elif one.name == "ropes":
            if len(mine) != len(theirs) or not all(map(partial(_same_rope, ours), mine, theirs)):
                return f"its rotary embedding is {', '.join(shown(rope) for rope in mine) or 'none'}"
        elif mine != theirs and not (
            isinstance(mine, float) and isinstance(theirs, float) and np.float32(mine) == np.float32(theirs)
        ):
            return f"{one.name}={shown(mine)} would be read as {shown(theirs)}"
    return None


def _layer_difference(index: int, ours: LayerConfig, read: LayerConfig, positions: int) -> str | None:
    for one in fields(ours):
        mine, theirs = getattr(ours, one.name), getattr(read, one.name)
        if one.name == "sliding_window":  # one as long as the context is none
            mine, theirs = (window if window and window < positions else None for window in (mine, theirs))
        if mine != theirs:
            return f"layer {index} has {one.name}={shown(mine)}"
    return None


def _same_rope(config: ModelConfig, ours: RopeConfig, read: RopeConfig) -> bool:
    (mine, scale), (theirs, other) = (
        rope_frequencies(one, config.head_dim, config.max_positions) for one in (ours, read)
    )
    return scale == other and torch.allclose(mine, theirs, rtol=1e-6, atol=0)
