"""A model folder -> a GGUF file: codes as they are in its blocks, other numbers as stored, a tensor in memory at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve._version import __version__
from halve.checkpoint.gguf_architecture import ARCHITECTURES, ROPE_FACTORS, Architecture
from halve.checkpoint.gguf_blocks import BLOCK, BY_NAME, blocks, numbers_of, rounding, share
from halve.checkpoint.gguf_config import gguf_fields, rope_factors
from halve.checkpoint.gguf_header import MAGIC, StoredTensor
from halve.checkpoint.gguf_plan import BLOCKS, DENSE, PlannedLinear, architecture_for, check_read_back, plan_linears
from halve.checkpoint.gguf_vocabulary import vocabulary_fields
from halve.checkpoint.gguf_writer import NewTensor, file_bytes, header_bytes, write_file
from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.checkpoint.stored import BIAS, SCALE, ZERO_POINT
from halve.checkpoint.tensors import cast
from halve.errors import HalveError, OutputError, UnsupportedModelError, refuse_pipe
from halve.files import check_disk, check_output_path, replacing
from halve.model import inventory
from halve.model.linear import Linear
from halve.progress import track
from halve.quantization import QuantizedWeight, unpack_zero

_CHUNK_VALUES = 2**22  # numbers turned into bytes at once: 16 MiB as float32
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}  # of ggml.h
_F32 = BY_NAME["F32"]


@dataclass(frozen=True)
class Exported:
    """A file that was written: its bytes, how many tensors of more than one row are of which type, what was rounded."""

    path: Path
    nbytes: int
    types: dict[str, int]
    rounding: str


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    requantize: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as the GGUF file `out`; dense weights in `dtype`, default as stored.

    Codes are those of the model. Codes that no type holds are rounded again to the type `requantize`, which the file then
    says; RecipeError where that is None. All but the values is checked before a weight is read, and nothing is left of a
    file that fails. Raises UnsupportedModelError for a model that the file would not say, OutputError for `out`.
    """
    if requantize is not None:
        _check_type(requantize)
    if dtype is not None and dtype not in DENSE:
        raise HalveError(f"dtype {dtype} is none of a GGUF file here: use float32, bfloat16 or float16")
    path = _checked_path(out, overwrite)
    checkpoint = open_checkpoint(model)
    name = architecture_for(checkpoint)
    linears = plan_linears(checkpoint, requantize, dtype)
    try:
        factors = rope_factors(checkpoint.config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{checkpoint.folder}: {error}: run it with halve") from error
    tensors = _Tensors(checkpoint, ARCHITECTURES[name], factors).of(linears)
    fields = gguf_fields(name, checkpoint.config) | vocabulary_fields(checkpoint.folder, checkpoint.config.vocab_size)
    described = ((one.name, StoredTensor(one.shape, one.type, 0, one.nbytes)) for one in tensors)
    check_read_back(checkpoint, fields, described, factors)
    said = _rounding(checkpoint, linears)
    types = Counter(one.type.name for one in tensors if len(one.shape) > 1)
    header = header_bytes(fields | _about(checkpoint, types, said), tensors)
    nbytes = file_bytes(header, tensors)
    check_disk(path.parent, nbytes)
    with replacing(path) as temporary:
        write_file(temporary, header, track(tensors, description="export"))
    return Exported(path, nbytes, dict(types), said)


def _checked_path(out: str | Path, overwrite: bool) -> Path:
    path = Path(out).expanduser()
    refuse_pipe(path, OutputError)
    if path.is_file() and path.stat().st_size and not overwrite and _is_gguf(path):
        raise OutputError(f"{path}: exists: name another file, or replace it with --overwrite")
    return check_output_path(path, "a GGUF file", _is_gguf)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _check_type(requantize: str) -> None:
    """Raise HalveError for a type that numbers are not rounded to, or that takes a package which is missing."""
    dense = [block.name for block in DENSE.values()]
    if requantize in dense:
        return
    if requantize not in BLOCKS:
        raise HalveError(f"--requantize {requantize!r} is not known: use one of {', '.join([*dense, *BLOCKS])}")
    try:
        import gguf.quants  # noqa: F401
    except ImportError as error:
        raise HalveError(f"--requantize {requantize} takes a package more: pip install 'halve[gguf]'") from error


def _rounding(checkpoint: Checkpoint, linears: list[PlannedLinear]) -> str:
    """What the file changes of codes and scales, in words. Reads the scales; raises CheckpointError where none would do."""
    again = Counter(plan.type.name for plan in linears if plan.again)
    total = moved = 0
    largest = 0.0
    for plan in linears:
        stored, spec = plan.stored, plan.stored.spec
        if spec is None or plan.again:
            continue
        scale = checkpoint.tensor(f"{stored.name}.{SCALE}")
        zero = None
        if not spec.symmetric:
            zero = unpack_zero(checkpoint.tensor(f"{stored.name}.{ZERO_POINT}"), spec.bits, stored.kept_out)
        for numbers in numbers_of(scale, zero, spec):
            count, change = rounding(numbers, f"{checkpoint.folder}: '{stored.name}.{SCALE}'")
            total, moved, largest = total + numbers.numel(), moved + count, max(largest, change)
    parts = [f"{count} linears rounded again to {kind}" for kind, count in again.items()]
    if total:
        rounded = f"as they were, {moved:,} of {total:,} scales rounded to float16, by {share(largest)} at most"
        parts.append(f"codes {rounded}" if moved else "codes and scales as they were")
    return "; ".join(parts) or "nothing was quantized"


def _about(checkpoint: Checkpoint, types: Counter[str], said: str) -> dict[str, Any]:
    """Fields that say what the file is and how it was made."""
    recipe = checkpoint.manifest.get("recipe")
    return {
        "general.type": "model",
        "general.name": checkpoint.folder.resolve().name,
        "general.file_type": _FILE_TYPES[max(types, key=lambda kind: types[kind])],
        "general.quantization_version": 2,
        "halve.version": __version__,
        "halve.rounding": said,
    } | ({} if recipe is None else {"halve.recipe": json.dumps(recipe)})


class _Tensors:
    """The tensors of a file, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, factors: Tensor | None) -> None:
        self.checkpoint, self.architecture, self.factors = checkpoint, architecture, factors
        self.stored = {theirs: ours for ours, theirs in architecture.stems(len(checkpoint.config.layers)).items()}

    def of(self, linears: list[PlannedLinear]) -> list[NewTensor]:
        tensors = [] if self.factors is None else [self.vector(ROPE_FACTORS, self.factors.shape, lambda: self.factors)]
        for plan in linears:
            tensors += self.linear(plan)
        family, config = self.checkpoint.family, self.checkpoint.config
        norms = [shape for i in range(len(config.layers)) for shape in inventory.block_norms(family, config, i)]
        for norm in [*norms, inventory.final_norm(family, config)]:
            assert norm is not None
            stored = f"{self.stored[norm.name]}.weight"
            make = partial(self.norm, f"{norm.name}.weight", self.architecture.offset(stored))
            tensors.append(self.vector(stored, (norm.size,), make))
        return tensors

    def vector(self, name: str, shape: tuple[int, ...], make: Any) -> NewTensor:
        """Vectors are in float32: llama.cpp computes with them as they are."""
        return NewTensor(name, tuple(shape), _F32, lambda: [_raw(make().float())])

    def norm(self, name: str, offset: float) -> Tensor:
        return self.checkpoint.tensor(name).float() + offset

    def linear(self, plan: PlannedLinear) -> list[NewTensor]:
        shape = plan.stored.shape
        stored = self.stored[shape.name]
        order = _paired(shape.out_features, self.checkpoint.config.head_dim, self.architecture.in_pairs(f"{stored}."))
        size = (shape.out_features, shape.in_features)
        tensors = [NewTensor(f"{stored}.weight", size, plan.type, lambda: self.rows(plan, order))]
        if shape.bias:

            def bias() -> Tensor:
                return self.checkpoint.tensor(f"{shape.name}.{BIAS}")[order]

            tensors.append(self.vector(f"{stored}.{BIAS}", (shape.out_features,), bias))
        return tensors

    def rows(self, plan: PlannedLinear, order: Tensor) -> Iterator[np.ndarray]:
        """The bytes of a linear, its rows in this order, some at a time."""
        stored = plan.stored
        linear = self.checkpoint.linear(stored.shape, stored.dtype or self.checkpoint.dtype)
        origin = f"{self.checkpoint.folder}: {stored.name}"
        for index in order.split(max(1, _CHUNK_VALUES // stored.shape.in_features)):
            if isinstance(linear.weight, QuantizedWeight) and not plan.again:
                yield _raw(_blocks(linear.weight.rows(index)))
            else:
                yield _rounded(origin, _full_rows(linear, index), plan.type.name)


def _raw(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _paired(rows: int, head_dim: int, paired: bool) -> Tensor:
    """The order of a linear's rows: as they are, or neighbours from the first and second half of each head in turn."""
    order = torch.arange(rows)
    return order.view(-1, 2, head_dim // 2).transpose(1, 2).flatten() if paired else order


def _blocks(weight: QuantizedWeight) -> Tensor:
    groups = weight.column_groups()[::BLOCK]
    numbers = numbers_of(weight.scale, weight.zero, weight.spec)
    return blocks(weight.codes(), [number[:, groups] for number in numbers], weight.spec)


def _full_rows(linear: Linear, index: Tensor) -> Tensor:
    """Rows of what a linear computes with, dense and as wide as what it reads; those that are gone are zeros."""
    weight, place = linear.weight, index
    if linear.output_index is not None:
        place = torch.zeros(linear.out_features, dtype=torch.int64)
        place[linear.output_index] = torch.arange(linear.output_index.numel())
        place = place[index]
    rows = weight.rows(place).dequantize() if isinstance(weight, QuantizedWeight) else weight[place]
    if linear.output_index is not None:
        rows = rows * torch.isin(index, linear.output_index).unsqueeze(-1)
    if linear.input_index is None:
        return rows
    return rows.new_zeros(len(index), linear.in_features).index_copy_(1, linear.input_index, rows)


def _rounded(origin: str, rows: Tensor, kind: str) -> np.ndarray:
    """The bytes of dense rows in a type."""
    dtype = next((dtype for dtype, block in DENSE.items() if block.name == kind), None)
    if dtype is not None:
        return _raw(cast(origin, rows, dtype))
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    made = quantize(rows.float().numpy(), GGMLQuantizationType[kind])
    return np.ascontiguousarray(made)
