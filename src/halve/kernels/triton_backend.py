"""The Triton backend on the host: how weights lie in memory for it, which tile sizes run, and the launches.

Importing this module needs no Triton; the kernels (`triton_matmul`) are imported when the first layer asks for them.

Dense weights stay as they are. Packed ones are held once, as the kernels read them: rows of segments (see
`triton_matmul`) in words of 32 bits, 3-bit codes in 4 bits. A segment never
crosses a group; where groups do not divide into segments, columns are sorted by group and each group is padded.

Shape legend: O output rows, I columns of the stored weight, C stored columns (I and padding), G groups.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halve.quantization import QuantizedWeight, pack, unpack

MAX_ROWS = 16  # rows of x the fused kernels take; more go to torch's matmul
INTERPRETED = False  # True: also serve tensors on the CPU, through Triton's interpreter (tests)
_STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
_ROWS_AT_A_TIME = 8192  # rows repacked at once: bounds the copies while a model loads
_TILE_BYTES = 32 << 20  # expanded weights at a time in prefill: near the size of an H100's second-level cache
_ONE = 0x3F800000  # 1.0 as an integer
_TUNED = "HALVE_TRITON_TUNED"  # names a JSON file of tilings, as benchmarks/gpu.sh tune writes it
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def missing() -> str | None:
    """In one line why the kernels cannot run here, None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def load_kernels(name: str) -> Any:
    """A module of kernels beside this one, which imports Triton."""
    return importlib.import_module(f"halve.kernels.{name}")


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU: make that the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pdl() -> bool:
    """Whether a kernel may start while the one before it drains (programmatic dependent launch, Hopper and later)."""
    return os.environ.get("HALVE_PDL", "0") not in ("", "0")


@dataclass(frozen=True)
class Operand:
    """One weight [O, I] as the kernels read it.

    data: floating [O, I] or int32 [O, C / codes a word]; scale [O, G]; zero int8 [O, G] or None;
    group_map int32 [segments] or None (segment // segments_a_group); order int32 [C] or None: the column of the weight
    that stands at a stored place, -1 for padding (None: as they are, padding at the end).
    """

    data: Tensor
    bits: int
    rows: int
    columns: int
    segment: int = 128
    segments: int = 0
    segments_a_group: int = 0
    per_channel: bool = False
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_map: Tensor | None = None
    order: Tensor | None = None

    @property
    def per(self) -> int:
        """Codes in one element of `data`."""
        return 1 if self.bits == 16 else 32 // self.bits

    @property
    def stored_columns(self) -> int:
        return self.segments * self.segment

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        tensors = (self.data, self.scale, self.zero, self.group_map, self.order)
        return sum(t.nbytes for t in tensors if t is not None)

    def index(self, kept: Tensor | None) -> Tensor | None:
        """Where each stored column is found in x, int32, once the inputs `kept` [I] were to be gathered from it."""
        if kept is None:
            return self.order
        if self.bits == 16:
            return kept.to(torch.int32)
        if self.order is None:
            return functional.pad(kept.to(torch.int32), (0, self.stored_columns - self.columns), value=-1)
        found = kept.to(torch.int32)[self.order.clamp(min=0).long()]
        return torch.where(self.order >= 0, found, self.order)


def dense_operand(weight: Tensor) -> Operand:
    """A floating weight [O, I], shared and not copied (unless it is a strided view)."""
    rows, columns = weight.shape
    return Operand(weight.contiguous(), 16, rows, columns, 128, -(-columns // 128))


def packed_operand(weight: QuantizedWeight) -> Operand:
    """A packed weight, its codes laid out anew, some rows at a time."""
    bits, columns, groups = _STORED_BITS[weight.spec.bits], weight.in_features, weight.scale.shape[1]
    per = 32 // bits
    per_channel, order, group_map, a_group = groups == 1, None, None, 0
    if groups == 1 and weight.group_index is None:
        segment = max(16, min(128, 1 << (columns - 1).bit_length()))
        segments = -(-columns // segment)
    elif weight.group_index is None and _power_of_two_in(columns // groups) >= 16:
        size = columns // groups
        segment = min(128, _power_of_two_in(size))
        a_group, segments = size // segment, columns // segment
    else:
        segment, per_channel = max(8, per), False  # the least padding: a word or two
        sizes = torch.bincount(weight.column_groups(), minlength=groups)
        lengths = -(-sizes // segment)
        segments = int(lengths.sum())
        group_map = torch.repeat_interleave(torch.arange(groups, device=weight.device), lengths).to(torch.int32)
        order = _order(weight.column_groups(), sizes, lengths * segment)
    data = _lay_out(weight, bits, per, segment, segments, order)
    return Operand(
        data, bits, weight.out_features, columns, segment, segments, a_group, per_channel,
        weight.scale.contiguous(), None if weight.zero is None else weight.zero.contiguous(), group_map, order,
    )  # fmt: skip


def _power_of_two_in(number: int) -> int:
    return number & -number


def _order(groups_I: Tensor, sizes_G: Tensor, padded_G: Tensor) -> Tensor:
    """Columns sorted by group, each group filled up with -1 to its padded size: int32 [C]."""
    by_group = torch.argsort(groups_I, stable=True)
    first, target = sizes_G.cumsum(0) - sizes_G, padded_G.cumsum(0) - padded_G
    group = groups_I[by_group]
    place = target[group] + torch.arange(groups_I.numel(), device=groups_I.device) - first[group]
    order = torch.full((int(padded_G.sum()),), -1, dtype=torch.int32, device=groups_I.device)
    order[place] = by_group.to(torch.int32)
    return order


def _lay_out(weight: QuantizedWeight, bits: int, per: int, segment: int, segments: int, order: Tensor | None) -> Tensor:
    """The codes of a weight as `Operand.data`."""
    rows, stored = weight.out_features, segments * segment
    data = torch.empty(rows, stored // per, dtype=torch.int32, device=weight.device)
    for first in range(0, rows, _ROWS_AT_A_TIME):
        codes = unpack(weight.packed[first : first + _ROWS_AT_A_TIME], weight.spec.bits, weight.in_features)
        if order is not None:
            codes = codes.index_select(1, order.clamp(min=0).long())
        elif stored > weight.in_features:
            codes = functional.pad(codes, (0, stored - weight.in_features))
        shaped = codes.view(-1, segments, per, segment // per)
        words = torch.zeros(shaped.shape[0], segments, segment // per, dtype=torch.int32, device=codes.device)
        for j in range(per):
            # 3-bit codes are kept with the offset of 4 bits
            words |= (shaped[:, :, j].to(torch.int32) + (1 << (bits - 1))) << (bits * j)
        data[first : first + _ROWS_AT_A_TIME] = words.flatten(1)
    return data


class SegmentedWeight(QuantizedWeight):
    """A quantized weight held only as the Triton kernels read it; its stored form is rebuilt whenever it is asked for."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.__dict__.update(  # not by assignment: frozen, like its base
            spec=weight.spec,
            in_features=weight.in_features,
            group_index=weight.group_index,
            scale=weight.scale,
            zero=weight.zero,
            operand=packed_operand(weight),
        )

    operand: Operand

    @property
    def out_features(self) -> int:
        return self.operand.rows

    @property
    def device(self) -> torch.device:
        return self.operand.data.device

    @property
    def nbytes(self) -> int:
        return self.operand.nbytes + (0 if self.group_index is None else self.group_index.nbytes)

    @property
    def packed(self) -> Tensor:
        """The codes as stored, int32 [O, W]."""
        return pack(self.codes(), self.spec.bits)

    def codes(self) -> Tensor:
        held = self.operand
        shift = held.bits * torch.arange(held.per, dtype=torch.int32, device=self.device).view(-1, 1)
        words = held.data.view(held.rows, held.segments, 1, held.segment // held.per)
        stored = ((words >> shift) & ((1 << held.bits) - 1)) - (1 << (held.bits - 1))
        stored = stored.to(torch.int8).flatten(1)
        if held.order is None:
            return stored[:, : held.columns].contiguous()
        filled = held.order >= 0
        codes = torch.empty(held.rows, held.columns, dtype=torch.int8, device=self.device)
        codes[:, held.order[filled].long()] = stored[:, filled]
        return codes


@dataclass(frozen=True)
class Tiling:
    """Sizes a launch runs with: output rows of a tile, columns of a step, parts the columns are split into, warps of a
    program, steps whose loads are underway at once."""

    rows: int
    columns: int
    parts: int = 1
    warps: int = 4
    stages: int = 1


def tiling(operand: Operand, count: int) -> Tiling:
    """The tile sizes for `count` rows of x: measured ones if there are any for this shape, else by rule of thumb."""
    measured = _measured().get(tiling_key(operand, count))
    if measured is not None:
        return Tiling(*measured)
    if count > 1:
        return Tiling(32, 256 if operand.bits == 16 else 512, _parts(operand, 32))
    rows = 8 if operand.bits < 16 else 4
    return Tiling(rows, 1024, _parts(operand, rows))


def tiling_key(operand: Operand, count: int) -> str:
    """What tile sizes depend on, as a name."""
    return f"{operand.bits}bit-{operand.columns}x{operand.rows}-m{1 if count == 1 else MAX_ROWS}"


def _parts(operand: Operand, rows: int, programs: int = 256) -> int:
    """Parts of the columns that give about `programs` programs in all (an H100 has 132 multiprocessors)."""
    tiles, steps = -(-operand.rows // rows), -(-operand.columns // 1024)
    return max(1, min(8, steps, programs // tiles))


@functools.cache
def _measured() -> dict[str, list[int]]:
    path = os.environ.get(_TUNED)
    return json.loads(Path(path).read_text(encoding="utf-8"))["tilings"] if path else {}


@dataclass
class Scratch:
    """Memory that split products meet in: parts of sums, and counters that are 0 between launches."""

    device: torch.device
    partial: Tensor = field(init=False)
    arrived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=self.device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=self.device)

    def reserve(self, partial: int, arrived: int) -> None:
        """Make room for so many numbers and counters. Memory that grows moves, so this comes before a capture."""
        if self.partial.numel() < partial:
            self.partial = torch.empty(partial, dtype=torch.float32, device=self.device)
        if self.arrived.numel() < arrived:
            self.arrived = torch.zeros(arrived, dtype=torch.int32, device=self.device)


@functools.cache
def shared_scratch(device: torch.device) -> Scratch:
    """For products outside of a captured step."""
    return Scratch(device)


@dataclass(frozen=True)
class Fusion:
    """What is done around a product, all of it optional (see `triton_matmul`).

    index int32 [stored columns]: see `Operand.index`; gain [width of x] and eps: RMSNorm of x before; bias [O];
    place int32 [O]: output i goes to out[place[i]]; epilogue and activation: numbers of `triton_matmul`; gate [M, O]:
    what TIMES multiplies by; best float32 and best_row int32 [M, tiles]: the largest output of each tile and its row.
    """

    index: Tensor | None = None
    gain: Tensor | None = None
    eps: float = 0.0
    bias: Tensor | None = None
    place: Tensor | None = None
    epilogue: int = 0
    activation: int = 0
    gate: Tensor | None = None
    best: Tensor | None = None
    best_row: Tensor | None = None


def tiles_of(operand: Operand, count: int) -> int:
    """Tiles of output rows in a launch."""
    return -(-operand.rows // tiling(operand, count).rows)


def multiply(operand: Operand, x: Tensor, out: Tensor, fusion: Fusion, scratch: Scratch, sizes: Tiling) -> None:
    """out [M, ...] = the fused product with x [M, width], M <= 16; both of unit stride in their last dimension."""
    kernels = load_kernels("triton_matmul")
    count, width = x.shape
    assert 0 < count <= MAX_ROWS and x.stride(1) == 1 and out.stride(1) == 1
    columns = min(sizes.columns, operand.segment << (operand.segments - 1).bit_length())
    segments_a_step = max(1, columns // operand.segment)
    steps = -(-operand.segments // segments_a_step)
    parts, tiles = min(sizes.parts, steps), -(-operand.rows // sizes.rows)
    scratch.reserve(parts * count * operand.rows if parts > 1 else 0, tiles)
    unused = operand.data
    arguments: list[Any] = [x]
    arguments += [unused if t is None else t for t in (fusion.gain, fusion.index, operand.data)]
    arguments += [unused if t is None else t for t in (operand.scale, operand.zero, operand.group_map, out)]
    arguments += [unused if t is None else t for t in (fusion.bias, fusion.place, fusion.gate)]
    arguments += [unused if t is None else t for t in (fusion.best, fusion.best_row)]
    arguments += [scratch.partial if parts > 1 else unused, scratch.arrived]
    shape = [operand.rows, operand.columns, width, operand.segments, operand.groups]
    strides = [operand.data.stride(0), out.stride(0), 0 if fusion.gate is None else fusion.gate.stride(0)]
    ends = [-(-steps // parts), tiles, fusion.eps]
    options = _layout_options(operand) | {
        "GATHER": fusion.index is not None,
        "NORM": fusion.gain is not None,
        "EPILOGUE": fusion.epilogue,
        "ACTIVATION": fusion.activation,
        "HAS_BIAS": fusion.bias is not None,
        "SCATTER": fusion.place is not None,
        "BEST": fusion.best is not None,
        "N": sizes.rows,
        "G": segments_a_step,
        "PARTS": parts,
        "STAGES": sizes.stages,
        **launch_options(sizes.warps),
    }
    if count == 1:
        kernels.matvec[(tiles, parts)](*arguments, *shape, *strides, *ends, _ONE, **options)
    else:
        x_stride = [x.stride(0)]
        kernels.few_rows[(tiles, parts)](
            *arguments, count, *shape, *x_stride, *strides, *ends, M=MAX_ROWS, **options
        )  # fmt: skip


def launch_options(warps: int) -> dict[str, Any]:
    """Options that every launch of a step takes."""
    return {"PDL": pdl(), "num_warps": warps, **({"launch_pdl": True} if pdl() else {})}


def _layout_options(operand: Operand) -> dict[str, Any]:
    return {
        "BITS": operand.bits,
        "SEGMENT": operand.segment,
        "PER": operand.per,
        "SEGMENTS_A_GROUP": operand.segments_a_group,
        "PER_CHANNEL": operand.per_channel,
        "HAS_ZERO": operand.zero is not None,
    }


def expand_rows(operand: Operand, first: int, out: Tensor) -> None:
    """Rows `first`, first + 1, ... of a packed weight as numbers into out [rows, stored columns]."""
    kernels = load_kernels("triton_matmul")
    assert operand.scale is not None
    rows = min(operand.rows, first + out.shape[0])
    segments_a_step = max(1, 512 // operand.segment)
    grid = (-(-(rows - first) // 8), -(-operand.segments // segments_a_step))
    tensors = [operand.scale, operand.data if operand.zero is None else operand.zero]
    tensors.append(operand.data if operand.group_map is None else operand.group_map)
    kernels.expand[grid](
        operand.data, *tensors, out, first, rows, operand.segments, operand.groups, operand.data.stride(0),
        out.stride(0), N=8, G=segments_a_step, num_warps=4, **_layout_options(operand),
    )  # fmt: skip


class TritonMatmul:
    """Products on a GPU: up to 16 rows of x by the fused kernels, more by torch's matmul (tensor cores), to which packed
    weights go expanded tile by tile."""

    def __init__(self, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
        if isinstance(weight, Tensor):
            self.operand = dense_operand(weight)
            self.weight: Tensor | QuantizedWeight = self.operand.data
            self.kernel = f"triton-{_DTYPES[weight.dtype]}"
        else:
            held = SegmentedWeight(weight)
            self.operand, self.weight, self.kernel = held.operand, held, f"triton-int{weight.spec.bits}"
        self.prefill_kernel = "torch.linear" if isinstance(weight, Tensor) else "triton-expand + torch.matmul"

    @classmethod
    def serves(cls, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> str | None:
        if weight.device.type != "cuda" and not (INTERPRETED and weight.device.type == "cpu"):
            return f"the weight is on {weight.device}"
        if missing():
            return missing()
        if dtype not in _DTYPES or (isinstance(weight, Tensor) and weight.dtype not in _DTYPES):
            return f"computes in float32, bfloat16 and float16, not {dtype}"
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            return "the weight is empty"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        rows, held = x.reshape(-1, x.shape[-1]), self.operand
        with current(x.device):
            if rows.shape[0] > MAX_ROWS:
                return self._many(rows).view(*x.shape[:-1], held.rows)
            out = x.new_empty((*x.shape[:-1], held.rows))
            if rows.shape[0]:
                fusion, scratch = Fusion(index=held.order), shared_scratch(x.device)
                sizes = tiling(held, rows.shape[0])
                multiply(held, rows.contiguous(), out.view(-1, held.rows), fusion, scratch, sizes)
        return out

    def _many(self, x: Tensor) -> Tensor:
        held = self.operand
        if isinstance(self.weight, Tensor):
            return functional.linear(x, self.weight.to(x.dtype))
        if held.order is not None:
            x = x.index_select(1, held.order.clamp(min=0).long()) * (held.order >= 0)
        used = x.shape[1]
        tile_rows = max(1, min(held.rows, _TILE_BYTES // (held.stored_columns * x.element_size())))
        tile, out = x.new_empty((tile_rows, held.stored_columns)), x.new_empty((x.shape[0], held.rows))
        for first in range(0, held.rows, tile_rows):
            size = min(tile_rows, held.rows - first)
            expand_rows(held, first, tile[:size])
            out[:, first : first + size] = x @ tile[:size, :used].t()
        return out
