"""Checkpoints in the GPTQ format (AutoGPTQ, GPTQModel, ...) read as if they were in ours (docs/formats.md).

Shape legend: O output features, I input features, G groups, W words along I, Z words along O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.schemes import checked_spec
from halve.checkpoint.stored import (
    BIAS,
    GROUP_INDEX,
    PACKED,
    PACKED_SHAPE,
    SCALE,
    StoredLinear,
    check_dtype,
    check_index,
    packed_parts,
)
from halve.checkpoint.tensors import TensorSource, expect
from halve.errors import CheckpointError, UnsupportedModelError, shown
from halve.model.inventory import LinearShape
from halve.quantization import PACKABLE_BITS, QuantizedWeight, QuantSpec, unpack

PARTS = {"qweight": PACKED, "qzeros": PACKED, "scales": SCALE, "g_idx": GROUP_INDEX}  # and what they are like of ours
VERSIONS = ("gptq", "gptq_v2")  # v1 stores zero points less one


def read_gptq(
    qweight_WO: Tensor,
    qzeros_GZ: Tensor,
    scales_GO: Tensor,
    g_idx: Tensor | None,
    spec: QuantSpec,
    version: str = "gptq",
) -> QuantizedWeight:
    """One linear of a GPTQ checkpoint as a weight [O, I] in our form, bit for bit the same numbers.

    qweight int32, qzeros int32, scales floating, g_idx int32 [I] or None (column // group size). Codes are unsigned and
    packed along I, which is our packing transposed. A symmetric weight must have zero point 2^(b-1) throughout: any other
    means `version` is not the one the file was written in (CheckpointError).
    """
    bits = spec.bits
    rows = qweight_WO.shape[1]
    columns = qweight_WO.shape[0] * 32 // bits if g_idx is None else g_idx.numel()
    zero_OG = _zero_points(qzeros_GZ, bits, rows, version)
    if spec.symmetric:
        if zero_OG.any():
            other = int(zero_OG[zero_OG != 0][0]) + (1 << (bits - 1))
            raise CheckpointError(
                f"a symmetric {bits}-bit weight has zero point {other} where only {1 << (bits - 1)} can be when read as "
                f"{version!r}: set checkpoint_format in its config to {' or '.join(v for v in VERSIONS if v != version)}"
            )
        zero_OG = None
    group_index = None if g_idx is None else g_idx.to(torch.int32)
    plain = torch.arange(columns, dtype=torch.int32, device=qweight_WO.device) // spec.columns_per_group(columns)
    if group_index is None or torch.equal(group_index, plain):
        group_index = None if spec.divides(columns) else plain
    packed = qweight_WO.t().contiguous()
    return QuantizedWeight(packed, scales_GO.t().contiguous(), zero_OG, spec, columns, group_index)


def _zero_points(qzeros_GZ: Tensor, bits: int, rows: int, version: str) -> Tensor:
    """Signed zero points int8 [O, G]."""
    if version not in VERSIONS:
        raise UnsupportedModelError(f"checkpoint_format={version!r} is not handled: {' and '.join(VERSIONS)} are")
    if version == "gptq" and 32 % bits == 0:
        # one is added to all codes of a word at once: a writer that took one off a code of 0 borrowed from its
        # neighbour, and only the whole word gives that back
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros_GZ = qzeros_GZ + (ones if ones < 1 << 31 else ones - (1 << 32))
    zero_OG = unpack(qzeros_GZ, bits, rows).t().contiguous()
    if version == "gptq" and 32 % bits:
        half = 1 << (bits - 1)
        zero_OG = (zero_OG + half + 1).remainder(2 * half) - half
    return zero_OG


class GptqTensors:
    """The tensors of a GPTQ folder as if each quantized linear were stored in our form.

    `linears` are those of the model. Raises UnsupportedModelError for a config field that changes the numbers and is not
    handled, CheckpointError for tensors that do not fit together.
    """

    def __init__(
        self, tensors: TensorSource, config: dict[str, Any], linears: Iterable[LinearShape], origin: str
    ) -> None:
        self._tensors, self._origin = tensors, origin
        self._linears = [linear for linear in linears if f"{linear.name}.qweight" in tensors.shapes]
        self.spec, self.version = read_config(config, origin, self._symmetric)
        # columns that were taken in another order have groups that only an index tells, but for static ones
        self._needs_index = config.get("desc_act") is True and not config.get("static_groups")
        self.shapes, self.dtypes = dict(tensors.shapes), dict(tensors.dtypes)
        self.schemes: dict[str, QuantSpec] = {}
        self._parts: dict[str, tuple[str, str]] = {}  # our name -> linear, part
        self._indices: dict[str, Tensor] = {}  # of ours: opening asks for them, which then reads no weight
        self._last: tuple[str, dict[str, Tensor]] | None = None
        for linear in self._linears:
            self._rename(linear)

    def _symmetric(self, bits: int) -> bool:
        """Whether the zero points are those of a symmetric scheme, for a config that does not say; the first linear tells."""
        if not self._linears or f"{self._linears[0].name}.qzeros" not in self._tensors.shapes:
            return True
        rows = self._linears[0].out_features
        zeros = self._tensors.get(f"{self._linears[0].name}.qzeros")
        return any(not _zero_points(zeros, bits, rows, version).any() for version in VERSIONS)

    def _rename(self, linear: LinearShape) -> None:
        """Put our names, shapes and dtypes of a quantized linear in the place of GPTQ's."""
        name = linear.name
        self._check(linear)
        native = self._native(linear)
        for part in PARTS:
            self.shapes.pop(f"{name}.{part}", None)
        bias = f"{name}.bias"
        # many writers give every linear a bias of zeros, also where the architecture has none
        if not linear.bias and bias in self.shapes and not self._tensors.get(bias).any():
            del self.shapes[bias]
        for part, (shape, dtype) in native.parts(self.dtypes[f"{name}.scales"]).items():
            if part != BIAS:
                self.shapes[f"{name}.{part}"] = shape
                self.dtypes[f"{name}.{part}"] = dtype
                self._parts[f"{name}.{part}"] = name, part
        self.schemes[name] = self.spec

    def _check(self, linear: LinearShape) -> None:
        """UnsupportedModelError or CheckpointError unless the tensors are there in the shapes that the config asks for."""
        name, rows, columns, bits = linear.name, linear.out_features, linear.in_features, self.spec.bits
        groups, packed = -(-columns // self.spec.columns_per_group(columns)), (-(-columns * bits // 32), rows)
        if self.shapes[f"{name}.qweight"] == (columns, rows * bits // 32) != packed:
            raise UnsupportedModelError(
                f"{self._origin}: '{name}.qweight' is packed along the outputs, which is AWQ's layout and not GPTQ's, and not "
                "read: take the model it was made from, and let halve quantize that"
            )
        scales = self.shapes.get(f"{name}.scales", ())
        if scales[1:] == (rows,) and scales[0] != groups:
            raise CheckpointError(
                f"{self._origin}: group_size={self.spec.group_size} makes {groups} groups of the {columns} inputs of {name} "
                f"and '{name}.scales' has {scales[0]}: correct group_size"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": packed,
            "scales": (groups, rows),
            "qzeros": (groups, -(-rows * bits // 32)),
        }
        if f"{name}.g_idx" in self.shapes:
            shapes["g_idx"] = (columns,)
        for part, shape in shapes.items():
            expect(self._tensors, f"{name}.{part}", shape, self._origin)
            check_dtype(PARTS[part], self.dtypes[f"{name}.{part}"], f"{self._origin}: '{name}.{part}'")
        if "g_idx" in shapes:
            check_index(self._tensors.get(f"{name}.g_idx"), groups, f"{self._origin}: '{name}.g_idx'")

    def _native(self, linear: LinearShape) -> StoredLinear:
        """How the linear would be stored in our form."""
        columns = linear.in_features
        size = self.spec.columns_per_group(columns)
        plain = torch.arange(columns, dtype=torch.int32) // size
        index = self._group_index(linear.name)
        index = plain if index is None else index
        self._indices[f"{linear.name}.{PACKED_SHAPE}"] = torch.tensor([linear.out_features, columns])
        self._indices[f"{linear.name}.{GROUP_INDEX}"] = index
        ragged = not torch.equal(index, plain) or not self.spec.divides(columns)
        return StoredLinear(linear, linear.out_features, columns, self.spec, -(-columns // size), ragged)

    def _group_index(self, linear: str) -> Tensor | None:
        """The group of each column, int32; None: column // group size, also where the index was never filled in."""
        name = f"{linear}.g_idx"
        if name not in self._tensors.shapes:
            index = None
        else:
            index = self._tensors.get(name).to(torch.int32)
            index = index if index.any() else None
        if index is None and self._needs_index and self._tensors.shapes[f"{linear}.scales"][0] > 1:
            raise CheckpointError(
                f"{self._origin}: desc_act is true and {name!r}, which says how the columns of {linear} were ordered, is "
                "missing or all zeros: get an intact copy, or set desc_act to false if they were not"
            )
        return index

    def get(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._tensors.get(name)
        if name in self._indices:
            return self._indices[name]
        linear, part = self._parts[name]
        if self._last is None or self._last[0] != linear:
            self._last = linear, packed_parts(self._weight(linear))  # they are asked for one after another
        return self._last[1][part]

    def _weight(self, linear: str) -> QuantizedWeight:
        qweight, qzeros, scales = (self._tensors.get(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales"))
        try:
            return read_gptq(qweight, qzeros, scales, self._group_index(linear), self.spec, self.version)
        except CheckpointError as error:
            raise CheckpointError(f"{self._origin}: {linear}: {error}") from error


def read_config(
    config: dict[str, Any], origin: str, symmetric: Callable[[int], bool] = lambda bits: True
) -> tuple[QuantSpec, str]:
    """Scheme and version ("gptq" or "gptq_v2") of a `quantization_config` with quant_method gptq.

    `symmetric`: whether a scheme of so many bits is, asked where `sym` is missing. Raises UnsupportedModelError.
    """
    if config.get("dynamic"):
        raise UnsupportedModelError(
            f"{origin}: per-layer GPTQ settings (`dynamic`) are not handled: one scheme for all is"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModelError(f"{origin}: pack_dtype={shown(config['pack_dtype'])} is not handled: only int32 is")
    bits, size = _whole(config, "bits", origin), _whole(config, "group_size", origin)
    if bits not in PACKABLE_BITS:
        raise UnsupportedModelError(f"{origin}: bits={shown(bits)} is not handled: use one of {PACKABLE_BITS}")
    if size is not None and size < -1:
        raise UnsupportedModelError(f"{origin}: group_size={shown(size)} is not handled: -1 or a number of columns is")
    version = config.get("checkpoint_format") or "gptq"
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{origin}: checkpoint_format={shown(version)} is not handled: {' and '.join(VERSIONS)} are"
        )
    for key in ("sym", "desc_act"):
        if not isinstance(config.get(key), bool | None):
            raise UnsupportedModelError(f"{origin}: {key}={shown(config[key])} is not handled: true and false are")
    sym = config.get("sym")
    return checked_spec(bits, size or -1, symmetric(bits) if sym is None else sym, origin), version  # 0 is -1 to some


def _whole(config: dict[str, Any], key: str, origin: str) -> int | None:
    """A field that is a whole number, written as one or in quotes; None where there is none."""
    value = config.get(key)
    if value is None or type(value) is int:
        return value
    if not (isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < 10):
        raise UnsupportedModelError(f"{origin}: {key}={shown(value)} is not handled: a whole number is")
    return int(value)
