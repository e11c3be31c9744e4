"""Checkpoints in the GPTQ format (AutoGPTQ, GPTQModel, ...) read as if they were in ours (docs/formats.md).

Shape legend: O output features, I input features, G groups, W words along I, Z words along O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.tensors import TensorSource
from halve.errors import CheckpointError, UnsupportedModelError
from halve.model.families import LinearShape
from halve.quantization import PACKABLE_BITS, QuantizedWeight, QuantSpec, pack_zero, unpack

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
    bits, rows = spec.bits, qweight_WO.shape[1]
    columns = qweight_WO.shape[0] * 32 // bits if g_idx is None else g_idx.numel()
    zero_OG = _zero_points(qzeros_GZ, bits, rows, version)
    if spec.symmetric:
        if zero_OG.any():
            found = int(zero_OG[zero_OG != 0][0]) + (1 << (bits - 1))
            raise CheckpointError(
                f"a symmetric {bits}-bit weight has zero point {found} where only {1 << (bits - 1)} can be when read as "
                f"{version!r}: set checkpoint_format in its config to {' or '.join(v for v in VERSIONS if v != version)}"
            )
        zero_OG = None
    group_index = None if g_idx is None else g_idx.to(torch.int32)
    plain = torch.arange(columns, dtype=torch.int32, device=qweight_WO.device) // spec.columns_per_group(columns)
    if group_index is None or torch.equal(group_index, plain):
        group_index = None if spec.divides(columns) else plain
    packed, scale = qweight_WO.t().contiguous(), scales_GO.t().contiguous()
    return QuantizedWeight(packed, scale, zero_OG, spec, columns, group_index)


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
    """The tensors of a GPTQ folder under our names: each quantized linear shows `weight_packed`, `weight_scale`, ...

    `linears` are those of the model. Raises UnsupportedModelError for a config field that changes the numbers and is not
    handled, CheckpointError for tensors that do not fit together.
    """

    def __init__(
        self, tensors: TensorSource, config: dict[str, Any], linears: Iterable[LinearShape], origin: str
    ) -> None:
        self._inner, self._origin = tensors, origin
        self.spec, self.version = read_config(config, origin)
        self.shapes, self.dtypes = dict(tensors.shapes), dict(tensors.dtypes)
        self.schemes: dict[str, QuantSpec] = {}
        self._parts: dict[str, tuple[str, str]] = {}  # our name -> linear, part
        self._last: tuple[str, QuantizedWeight] | None = None
        for linear in linears:
            if f"{linear.name}.qweight" in tensors.shapes:
                self._show(linear)

    def _show(self, linear: LinearShape) -> None:
        name, spec = linear.name, self.spec
        for part in ("qweight", "qzeros", "scales"):
            if f"{name}.{part}" not in self.shapes:
                raise CheckpointError(f"{self._origin}: tensor '{name}.{part}' is missing: download the model again")
        rows, columns = linear.out_features, linear.in_features
        words, groups = -(-columns * spec.bits // 32), -(-columns // spec.columns_per_group(columns))
        for part, shape in (("qweight", (words, rows)), ("scales", (groups, rows))):
            if self.shapes[f"{name}.{part}"] != shape:
                found = list(self.shapes[f"{name}.{part}"])
                raise CheckpointError(f"{self._origin}: '{name}.{part}' is {found}, the config asks for {list(shape)}")
        shown = {"weight_packed": (rows, words), "weight_scale": (rows, groups), "weight_shape": (2,)}
        if not spec.symmetric:
            shown["weight_zero_point"] = (-(-rows * spec.bits // 32), groups)
        g_idx = f"{name}.g_idx"
        plain = torch.arange(columns, dtype=torch.int32) // spec.columns_per_group(columns)
        ordered = g_idx not in self.shapes or torch.equal(self._inner.get(g_idx).to(torch.int32), plain)
        if not ordered or not spec.divides(columns):
            shown["group_index"] = (columns,)
        scale_dtype = self.dtypes[f"{name}.scales"]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            self.shapes.pop(f"{name}.{part}", None)
        bias = f"{name}.bias"
        # many writers give every linear a bias of zeros, also where the architecture has none
        if not linear.bias and bias in self.shapes and not self._inner.get(bias).any():
            del self.shapes[bias]
        for part, shape in shown.items():
            self.shapes[f"{name}.{part}"] = shape
            self.dtypes[f"{name}.{part}"] = scale_dtype if part == "weight_scale" else torch.int32
            self._parts[f"{name}.{part}"] = name, part
        self.schemes[name] = spec

    def get(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._inner.get(name)
        linear, part = self._parts[name]
        weight = self._weight(linear)
        parts = {
            "weight_packed": weight.packed,
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor(weight.shape),
            "weight_zero_point": None if weight.zero is None else pack_zero(weight.zero, self.spec.bits),
            "group_index": weight.group_index,
        }
        value = parts[part]
        assert value is not None, name
        return value

    def _weight(self, linear: str) -> QuantizedWeight:
        if self._last is not None and self._last[0] == linear:
            return self._last[1]  # its parts are asked for one after another
        g_idx = f"{linear}.g_idx"
        qweight, qzeros, scales = (self._inner.get(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales"))
        index = self._inner.get(g_idx) if g_idx in self._inner.shapes else None
        try:
            weight = read_gptq(qweight, qzeros, scales, index, self.spec, self.version)
        except CheckpointError as error:
            raise CheckpointError(f"{self._origin}: {linear}: {error}") from error
        self._last = linear, weight
        return weight


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
    return QuantSpec(bits, config.get("group_size", -1), bool(config.get("sym", True))), version
