"""What of every stored tensor a rank reads and holds: from how the tensors are stored and which share the rank has.

A rank's tensors are those of an ordinary, narrower model, which everything that reads a checkpoint reads as it is. They are
planned from headers and indices (`plan_tensors`) before a weight is read; bytes and refusals come from the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checkpoint.stored import (
    BIAS,
    GROUP_INDEX,
    KEPT_INPUTS,
    KEPT_OUTPUTS,
    PACKED,
    PACKED_SHAPE,
    SCALE,
    WEIGHT,
    ZERO_POINT,
    StoredLinear,
)
from halve.checkpoint.tensors import TensorSource, read_part
from halve.model import inventory
from halve.model.families import Family
from halve.model.shares import LinearShare, Share
from halve.quantization import CodeRun, QuantSpec, code_run, cut_run

IndexOf = Callable[[str], Tensor]  # the values of an index, by part


@dataclass(frozen=True)
class TensorShare:
    """One tensor as a rank has it. rows, columns: what is read of the stored one (columns None: it is a vector); run: the
    codes in the words that are read, along `axis`; values: nothing is read, these are they."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: range = range(0)
    columns: range | None = None
    run: CodeRun | None = None
    axis: int = 1
    values: Tensor | None = None

    @classmethod
    def made(cls, values: Tensor) -> TensorShare:
        """Of values that are known."""
        return cls(tuple(values.shape), values.dtype, values=values)

    @classmethod
    def read(cls, dtype: torch.dtype, rows: range, columns: range | None = None) -> TensorShare:
        """A part of the stored tensor as it is."""
        shape = (len(rows),) if columns is None else (len(rows), len(columns))
        return cls(shape, dtype, rows, columns)

    @property
    def read_bytes(self) -> int:
        """Bytes of the stored tensor that are read."""
        if self.values is not None:
            return 0
        return len(self.rows) * (1 if self.columns is None else len(self.columns)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that the rank has."""
        return math.prod(self.shape) * self.dtype.itemsize


def share_linear(
    stored: StoredLinear, share: LinearShare, index: IndexOf, dtype: torch.dtype
) -> tuple[QuantSpec | None, dict[str, TensorShare]]:
    """A rank's tensors of one linear by part, and their scheme; `dtype` is that of the model."""
    headers = stored.parts(dtype)
    rows, kept_rows = _kept(KEPT_OUTPUTS, share.rows, headers, index)
    columns, kept_columns = _kept(KEPT_INPUTS, share.columns, headers, index)
    parts: dict[str, TensorShare] = {}
    spec = stored.spec if rows and columns else None
    if not (rows and columns):
        # nothing is left of this rank's part: one weight of zero, so that no layer has to do without any
        rows, kept_rows = (rows, kept_rows) if rows else (range(1), torch.zeros(1, dtype=torch.int32))
        columns, kept_columns = (columns, kept_columns) if columns else (range(1), torch.zeros(1, dtype=torch.int32))
        parts[WEIGHT] = TensorShare.made(torch.zeros(len(rows), len(columns), dtype=stored.dtype or dtype))
    elif spec is None:
        parts[WEIGHT] = TensorShare.read(headers[WEIGHT][1], rows, columns)
    else:
        parts |= _packed(stored, spec, rows, columns, headers, index)
    if BIAS in headers:
        kind = headers[BIAS][1]
        zeros = torch.zeros(len(share.rows), dtype=kind)
        parts[BIAS] = TensorShare.read(kind, share.rows) if share.adds_bias else TensorShare.made(zeros)
    for part, kept, of in ((KEPT_OUTPUTS, kept_rows, share.rows), (KEPT_INPUTS, kept_columns, share.columns)):
        if kept is not None and kept.numel() < len(of):
            parts[part] = TensorShare.made(kept)
    return spec, parts


def _kept(part: str, own: range, headers: Mapping[str, object], index: IndexOf) -> tuple[range, Tensor | None]:
    """Which stored rows or columns belong to `own` of all that the layer has, and where they are in it."""
    if part not in headers:
        return own, None
    kept = index(part)
    first, end = (int(torch.searchsorted(kept, bound)) for bound in (own.start, own.stop))
    return range(first, end), kept[first:end] - own.start


def _packed(
    stored: StoredLinear,
    spec: QuantSpec,
    rows: range,
    columns: range,
    headers: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    index: IndexOf,
) -> dict[str, TensorShare]:
    """A quantized weight: words where codes fill them, codes out of their words elsewhere; the groups its columns need.

    Columns that end inside a group leave groups of unequal size, of which every column names its own.
    """
    size = spec.columns_per_group(stored.kept_in)
    if stored.ragged:
        named = index(GROUP_INDEX)[columns.start : columns.stop]
        groups = range(int(named.min()), int(named.max()) + 1)
    else:
        named = torch.arange(columns.start, columns.stop, dtype=torch.int32) // size
        groups = range(columns.start // size, (columns.stop - 1) // size + 1)
    whole_groups = columns.start % size == 0 and columns.stop % size == 0
    run = code_run(columns, spec.bits)
    parts = {
        PACKED: TensorShare((len(rows), run.packed_words), torch.int32, rows, run.words, run),
        SCALE: TensorShare.read(headers[SCALE][1], rows, groups),
        PACKED_SHAPE: TensorShare.made(torch.tensor([len(rows), len(columns)])),
    }
    if ZERO_POINT in headers:
        run = code_run(rows, spec.bits)
        parts[ZERO_POINT] = TensorShare((run.packed_words, len(groups)), torch.int32, run.words, groups, run, axis=0)
    if stored.ragged or not (whole_groups or spec.group_size == -1):
        parts[GROUP_INDEX] = TensorShare.made((named - groups.start).to(torch.int32))
    return parts


def plan_tensors(
    share: Share, family: Family, linears: Iterable[StoredLinear], tensors: TensorSource, dtype: torch.dtype
) -> tuple[dict[str, TensorShare], dict[str, QuantSpec]]:
    """Every tensor of a rank by name, and the scheme of each quantized linear. Reads the indices of `tensors`, no weight."""
    plan: dict[str, TensorShare] = {}
    schemes: dict[str, QuantSpec] = {}
    for stored in linears:
        spec, parts = share_linear(
            stored, share.linear(stored.shape), lambda part, name=stored.name: tensors.get(f"{name}.{part}"), dtype
        )
        plan |= {f"{stored.name}.{part}": tensor for part, tensor in parts.items()}
        if spec is not None:
            schemes[stored.name] = spec
    for name, own in _vectors(share, family).items():
        shape = tensors.shapes[name]
        plan[name] = TensorShare.read(tensors.dtypes[name], own, range(shape[1]) if len(shape) == 2 else None)
    return plan, schemes


def _vectors(share: Share, family: Family) -> dict[str, range]:
    """The rows that a rank has of every tensor that is not part of a linear."""
    rows = {name: range(shape[0]) for name, shape in inventory.vector_shapes(family, share.whole).items()}
    for index in range(len(share.whole.layers)):
        for norm in inventory.block_norms(family, share.whole, index):
            own = {f"{norm.name}.{part}": share.norm(index, norm) for part in ("weight", "bias")}
            rows |= {name: run for name, run in own.items() if name in rows}
    return rows


class SharedTensors:
    """The tensors of one rank, read out of those of the whole model; `read_bytes`: so much was read of them."""

    def __init__(self, tensors: TensorSource, plan: Mapping[str, TensorShare]) -> None:
        self._tensors, self.plan = tensors, plan
        self.shapes = {name: share.shape for name, share in plan.items()}
        self.dtypes = {name: share.dtype for name, share in plan.items()}
        self.read_bytes = 0

    def get(self, name: str) -> Tensor:
        share = self.plan[name]
        if share.values is not None:
            return share.values
        tensor, read = read_part(self._tensors, name, share.rows, share.columns)
        self.read_bytes += read
        if share.run is None:
            return tensor
        return cut_run(tensor, share.run) if share.axis == 1 else cut_run(tensor.t(), share.run).t().contiguous()
