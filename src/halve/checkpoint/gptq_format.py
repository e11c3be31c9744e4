"""Checkpoints in the GPTQ format (AutoGPTQ, GPTQModel, ...) read as if they were in ours (docs/formats.md).

Shape legend: O output features, I input features, G groups, W words along I, Z words along O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.schemes import checked_spec
from halve.checkpoint.stored import BIAS, PACKED, StoredLinear, packed_parts
from halve.checkpoint.tensors import TensorSource, expect
from halve.errors import CheckpointError, UnsupportedModelError
from halve.model.families import LinearShape
from halve.quantization import PACKABLE_BITS, QuantizedWeight, QuantSpec, unpack

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
        self.spec, self.version = read_config(config, origin)
        self.shapes, self.dtypes = dict(tensors.shapes), dict(tensors.dtypes)
        self.schemes: dict[str, QuantSpec] = {}
        self._parts: dict[str, tuple[str, str]] = {}  # our name -> linear, part
        self._last: tuple[str, dict[str, Tensor]] | None = None
        for linear in linears:
            if f"{linear.name}.qweight" in tensors.shapes:
                self._rename(linear)

    def _rename(self, linear: LinearShape) -> None:
        """Put our names, shapes and dtypes of a quantized linear in the place of GPTQ's."""
        name = linear.name
        native = self._native(linear)
        expect(self._tensors, f"{name}.qweight", native.parts(torch.float32)[PACKED][0][::-1], self._origin)
        expect(self._tensors, f"{name}.scales", (native.groups, linear.out_features), self._origin)
        if f"{name}.qzeros" not in self.shapes:
            raise CheckpointError(f"{self._origin}: tensor '{name}.qzeros' is missing: download the model again")
        for part in ("qweight", "qzeros", "scales", "g_idx"):
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

    def _native(self, linear: LinearShape) -> StoredLinear:
        """How the linear would be stored in our form."""
        columns = linear.in_features
        size = self.spec.columns_per_group(columns)
        g_idx = f"{linear.name}.g_idx"
        plain = torch.arange(columns, dtype=torch.int32) // size
        ordered = g_idx not in self.shapes or torch.equal(self._tensors.get(g_idx).to(torch.int32), plain)
        ragged = not ordered or not self.spec.divides(columns)
        return StoredLinear(linear, linear.out_features, columns, self.spec, -(-columns // size), ragged)

    def get(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._tensors.get(name)
        linear, part = self._parts[name]
        if self._last is None or self._last[0] != linear:
            self._last = linear, packed_parts(self._weight(linear))  # they are asked for one after another
        return self._last[1][part]

    def _weight(self, linear: str) -> QuantizedWeight:
        qweight, qzeros, scales = (self._tensors.get(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales"))
        g_idx = f"{linear}.g_idx"
        index = self._tensors.get(g_idx) if g_idx in self._tensors.shapes else None
        try:
            return read_gptq(qweight, qzeros, scales, index, self.spec, self.version)
        except CheckpointError as error:
            raise CheckpointError(f"{self._origin}: {linear}: {error}") from error


def read_config(config: dict[str, Any], origin: str) -> tuple[QuantSpec, str]:
    """Scheme and version ("gptq" or "gptq_v2") of a `quantization_config` with quant_method gptq."""
    if config.get("dynamic"):
        raise UnsupportedModelError(
            f"{origin}: per-layer GPTQ settings (`dynamic`) are not handled: one scheme for all is"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModelError(f"{origin}: pack_dtype={config['pack_dtype']!r} is not handled: only int32 is")
    bits = config.get("bits")
    if bits not in PACKABLE_BITS:
        raise UnsupportedModelError(f"{origin}: bits={bits!r} is not handled: use one of {PACKABLE_BITS}")
    version = config.get("checkpoint_format", "gptq")
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{origin}: checkpoint_format={version!r} is not handled: {' and '.join(VERSIONS)} are"
        )
    return checked_spec(bits, config.get("group_size", -1), config.get("sym", True), origin), version
