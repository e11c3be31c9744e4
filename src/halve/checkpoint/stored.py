"""How one linear is stored: names, shapes, dtypes and bytes of its tensors, and the way to and from a `Linear`.

The table of docs/formats.md in code, and the only place that knows it: plans count bytes with it before there is a weight,
readers check headers against it, writers, folders of other formats and drop-in layers make their tensors with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.checkpoint.tensors import TensorSource, expect
from halve.errors import CheckpointError
from halve.model.inventory import LinearShape
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, pack_zero, unpack_zero

WEIGHT = "weight"
BIAS = "bias"
PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
PACKED_SHAPE = "weight_shape"
GROUP_INDEX = "group_index"
KEPT_INPUTS = "kept_inputs"
KEPT_OUTPUTS = "kept_outputs"
PARTS = (WEIGHT, BIAS, PACKED, SCALE, ZERO_POINT, PACKED_SHAPE, GROUP_INDEX, KEPT_INPUTS, KEPT_OUTPUTS)
WORDS = (PACKED, ZERO_POINT)  # of another width they would hold other codes
INDICES = (PACKED_SHAPE, GROUP_INDEX, KEPT_INPUTS, KEPT_OUTPUTS)

Header = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class StoredLinear:
    """One linear as a file stores it, or will at some point of a recipe.

    shape: what it is called, reads and writes; kept_out, kept_in: rows and columns of it that are stored; spec: None is a
    dense weight; groups: scales in a row; ragged: every column names its group, because columns of a quantized weight are
    gone; dtype, bias_dtype: of its weight or scales, and of its bias; None is that of the model.
    """

    shape: LinearShape
    kept_out: int
    kept_in: int
    spec: QuantSpec | None = None
    groups: int = 0
    ragged: bool = False
    dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None

    @classmethod
    def dense(cls, shape: LinearShape, dtype: torch.dtype | None = None) -> StoredLinear:
        """All of the linear, not quantized."""
        return cls(shape, shape.out_features, shape.in_features, dtype=dtype)

    @classmethod
    def of(cls, linear: Linear, shape: LinearShape) -> StoredLinear:
        """How `linear` will be stored."""
        weight = linear.weight
        rows, columns = weight.shape
        bias = None if linear.bias is None else linear.bias.dtype
        if not isinstance(weight, QuantizedWeight):
            return cls(shape, rows, columns, dtype=weight.dtype, bias_dtype=bias)
        ragged = weight.group_index is not None
        return cls(shape, rows, columns, weight.spec, weight.scale.shape[1], ragged, weight.scale.dtype, bias)

    @classmethod
    def from_headers(
        cls, tensors: TensorSource, shape: LinearShape, spec: QuantSpec | None, origin: str
    ) -> StoredLinear:
        """How `tensors` store a linear that the config gives `spec`; `check` says whether they do so without fault.

        Raises CheckpointError, which names `origin`, for what contradicts itself.
        """
        name = shape.name
        rows = _kept(tensors, f"{name}.{KEPT_OUTPUTS}", shape.out_features, origin)
        columns = _kept(tensors, f"{name}.{KEPT_INPUTS}", shape.in_features, origin)
        bias = tensors.dtypes.get(f"{name}.{BIAS}") if shape.bias else None
        if f"{name}.{PACKED}" not in tensors.shapes:
            return cls(shape, rows, columns, dtype=tensors.dtypes.get(f"{name}.{WEIGHT}"), bias_dtype=bias)
        if spec is None:
            raise CheckpointError(f"{origin}: {name!r} is packed but quantization_config does not describe it")
        scale = f"{name}.{SCALE}"
        ragged = f"{name}.{GROUP_INDEX}" in tensors.shapes
        if ragged:
            groups = _last_dimension(tensors, scale)
        elif spec.divides(columns):
            groups = columns // spec.columns_per_group(columns)
        else:
            raise CheckpointError(f"{origin}: {name!r} has {columns} inputs, not a multiple of {spec.group_size}")
        return cls(shape, rows, columns, spec, groups, ragged, tensors.dtypes.get(scale), bias)

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def key(self) -> tuple[int | None, str]:
        """(layer, role); (None, "head") is the output head."""
        return self.shape.layer, self.shape.role

    @property
    def parameters(self) -> int:
        return self.kept_out * self.kept_in

    @property
    def whole(self) -> bool:
        """True when every input and output the layer has is stored."""
        return self.kept_in == self.shape.in_features and self.kept_out == self.shape.out_features

    def parts(self, dtype: torch.dtype) -> dict[str, Header]:
        """Shape and dtype of every tensor by the part of its name after the linear's; `dtype` is that of the model."""
        rows, columns, spec = self.kept_out, self.kept_in, self.spec
        parts: dict[str, Header] = {}
        if spec is None:
            parts[WEIGHT] = (rows, columns), self.dtype or dtype
        else:
            parts[PACKED] = (rows, _words(columns, spec)), torch.int32
            parts[SCALE] = (rows, self.groups), self.dtype or dtype
            parts[PACKED_SHAPE] = (2,), torch.int64
            if not spec.symmetric:
                parts[ZERO_POINT] = (_words(rows, spec), self.groups), torch.int32
            if self.ragged:
                parts[GROUP_INDEX] = (columns,), torch.int32
        if self.shape.bias:
            parts[BIAS] = (self.shape.out_features,), self.bias_dtype or dtype
        if columns < self.shape.in_features:
            parts[KEPT_INPUTS] = (columns,), torch.int32
        if rows < self.shape.out_features:
            parts[KEPT_OUTPUTS] = (rows,), torch.int32
        return parts

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all its tensors; `dtype` is that of the model."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.parts(dtype).values())

    def quantized(self, spec: QuantSpec) -> StoredLinear:
        """The same linear under `spec`, its scales in the dtype of its weight."""
        groups = self.kept_in // spec.columns_per_group(self.kept_in)
        return replace(self, spec=spec, groups=groups, ragged=False)

    def keeping(self, outputs: int | None = None, inputs: int | None = None) -> StoredLinear:
        """The same linear with so many of its rows or columns stored; what it reads and writes stays as wide.

        Which columns go is not known here: a group that loses all of them takes its scales along, a few bytes less.
        """
        rows = self.kept_out if outputs is None else outputs
        columns = self.kept_in if inputs is None else inputs
        # removing columns of a quantized weight leaves groups of unequal size
        ragged = self.ragged or (self.spec is not None and self.spec.group_size != -1 and columns < self.kept_in)
        return replace(self, kept_out=rows, kept_in=columns, ragged=ragged)

    def narrowed(self, outputs: int | None = None, inputs: int | None = None) -> StoredLinear:
        """The same linear between narrower activations: neighbours change with it and no index is stored."""
        shape = self.shape
        rows = shape.out_features if outputs is None else outputs
        columns = shape.in_features if inputs is None else inputs
        return replace(self.keeping(outputs, inputs), shape=replace(shape, out_features=rows, in_features=columns))

    def check(self, tensors: TensorSource, origin: str) -> None:
        """CheckpointError, which names `origin`, unless every part is there in its shape and kind of dtype, no other
        part is, and what points or measures fits the rest. Reads the indices, no weight."""
        asked = replace(self, dtype=None, bias_dtype=None)  # which are the headers' own word
        parts = asked.parts(torch.float32)
        for part, (shape, _) in parts.items():
            name = f"{self.name}.{part}"
            expect(tensors, name, shape, origin)
            check_dtype(part, tensors.dtypes[name], f"{origin}: {name!r}")
        expected = {f"{self.name}.{part}" for part in parts}
        for name in sorted(tensor_names(self.shape) & tensors.shapes.keys() - expected):
            raise CheckpointError(f"{origin}: {name!r} contradicts the config or the layer's other tensors: delete it")
        indices = {part: tensors.get(f"{self.name}.{part}") for part in INDICES if part in parts}
        self.check_values(indices, f"{origin}: ")

    def check_values(self, parts: Mapping[str, Tensor], origin: str = "") -> None:
        """CheckpointError, which begins with `origin`, where an index among `parts` points outside, kept channels are not
        ascending, or weight_shape is not the weight's."""
        if PACKED_SHAPE in parts and parts[PACKED_SHAPE].tolist() != [self.kept_out, self.kept_in]:
            raise CheckpointError(
                f"{origin}'{self.name}.{PACKED_SHAPE}' is {parts[PACKED_SHAPE].tolist()}, the weight is "
                f"[{self.kept_out}, {self.kept_in}]: get an intact copy"
            )
        sizes = {GROUP_INDEX: self.groups, KEPT_INPUTS: self.shape.in_features, KEPT_OUTPUTS: self.shape.out_features}
        for part in parts.keys() & sizes.keys():
            check_index(parts[part], sizes[part], f"{origin}'{self.name}.{part}'", ascending=part != GROUP_INDEX)

    def to_linear(self, get: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str) -> Linear:
        """The layer itself; `get` gives the tensor of a part.

        Dense weights and biases in `dtype`, scales as stored. Raises CheckpointError as `check_values` does.
        """
        parts = self.parts(dtype)
        self.check_values({part: get(part) for part in INDICES if part in parts})
        inputs, outputs = self.shape.in_features, self.shape.out_features

        def index(part: str, kept: int, size: int) -> Tensor | None:
            return get(part).long().to(device) if kept < size else None

        return Linear(
            get(WEIGHT).to(dtype).to(device) if self.spec is None else self._packed(get, self.spec).to(device),
            get(BIAS).to(dtype).to(device) if self.shape.bias else None,
            index(KEPT_INPUTS, self.kept_in, inputs),
            index(KEPT_OUTPUTS, self.kept_out, outputs),
            inputs,
            outputs,
        )

    def _packed(self, get: Callable[[str], Tensor], spec: QuantSpec) -> QuantizedWeight:
        zero = None if spec.symmetric else unpack_zero(get(ZERO_POINT), spec.bits, self.kept_out)
        groups = get(GROUP_INDEX) if self.ragged else None
        return QuantizedWeight(get(PACKED), get(SCALE), zero, spec, self.kept_in, groups)


def to_parts(linear: Linear, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a linear by part, on its device; dense weights and biases in `dtype` (None: as they are)."""
    parts: dict[str, Tensor] = {}
    if isinstance(linear.weight, QuantizedWeight):
        parts |= packed_parts(linear.weight)
    else:
        parts[WEIGHT] = linear.weight if dtype is None else linear.weight.to(dtype)
    if linear.bias is not None:
        parts[BIAS] = linear.bias if dtype is None else linear.bias.to(dtype)
    for part, index in ((KEPT_INPUTS, linear.input_index), (KEPT_OUTPUTS, linear.output_index)):
        if index is not None:
            parts[part] = index.to(torch.int32)
    return parts


def packed_parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized weight by part."""
    parts = {PACKED: weight.packed, SCALE: weight.scale, PACKED_SHAPE: torch.tensor(weight.shape, device=weight.device)}
    if weight.zero is not None:
        parts[ZERO_POINT] = pack_zero(weight.zero, weight.spec.bits)
    if weight.group_index is not None:
        parts[GROUP_INDEX] = weight.group_index.to(torch.int32)
    return parts


def to_tensors(name: str, linear: Linear, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a file holds of the linear `name`, on the CPU; dense weights and biases in `dtype` (None: as they are)."""
    return {f"{name}.{part}": tensor.contiguous().cpu() for part, tensor in to_parts(linear, dtype).items()}


def tensor_names(shape: LinearShape) -> set[str]:
    """Every name that a tensor of this linear can have."""
    return {f"{shape.name}.{part}" for part in PARTS if part != BIAS or shape.bias}


def check_dtype(part: str, dtype: torch.dtype, name: str) -> None:
    """CheckpointError, which begins with `name`, unless tensors of this part may have the dtype."""
    if part in WORDS:
        fits, wanted = dtype == torch.int32, "torch.int32"
    elif part in INDICES:
        fits, wanted = dtype in (torch.int32, torch.int64), "torch.int32 or torch.int64"
    else:
        fits, wanted = dtype.is_floating_point, "floating"
    if not fits:
        raise CheckpointError(f"{name} is {dtype}, it must be {wanted}: get an intact copy")


def check_index(index: Tensor, size: int, name: str, *, ascending: bool = False) -> None:
    """CheckpointError, which begins with `name`, unless every value is a place below `size`, and if asked above the one
    before it."""
    low, high = (int(value) for value in torch.aminmax(index)) if index.numel() else (0, 0)
    if low < 0 or high >= size:
        value = low if low < 0 else high
        raise CheckpointError(f"{name} points to {value}, outside of 0 to {size - 1}: get an intact copy")
    if ascending and not bool((index.diff() > 0).all()):
        place = int((index.diff() <= 0).nonzero()[0])
        pair = f"{int(index[place])} and then {int(index[place + 1])}"
        raise CheckpointError(f"{name} is not ascending, it names {pair}: get an intact copy")


def _words(codes: int, spec: QuantSpec) -> int:
    """int32 words that hold so many codes."""
    return -(-codes * spec.bits // 32)


def _last_dimension(tensors: TensorSource, name: str) -> int:
    return (0, *tensors.shapes.get(name, ()))[-1]


def _kept(tensors: TensorSource, name: str, size: int, origin: str) -> int:
    """How many of `size` channels are stored: as many as the index `name`, if there is one, names."""
    if name not in tensors.shapes:
        return size
    kept = _last_dimension(tensors, name)
    if not 0 < kept < size:
        raise CheckpointError(f"{origin}: {name!r} keeps {kept} of {size} channels, it must be some and not all")
    return kept
