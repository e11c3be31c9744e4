"""The Triton backend on the host: which tile sizes run, the launches, and what stands around a product.

Importing this module needs no Triton; the kernels (`triton_matmul`) are imported when the first layer asks for them.

Shape legend: M rows of x, D width of x, O output rows, G groups, F readers of x.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halve.errors import HalveError
from halve.kernels.triton_layout import PIECE, STORED_BITS, Operand, SegmentedWeight, dense_operand
from halve.quantization import QuantizedWeight

MAX_ROWS = 16  # rows of x the fused kernels take; more go to torch's matmul
_TILE_BYTES = 32 << 20  # expanded weights at a time in prefill: near the size of an H100's second-level cache
_TUNED = "HALVE_TRITON_TUNED"  # names a JSON file of tilings, as benchmarks/gpu.sh tune writes it
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def missing() -> str | None:
    """In one line why the kernels cannot run here, None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of a device. What interprets or emulates them elsewhere replaces this."""
    return device.type == "cuda"


def load_kernels(name: str) -> Any:
    """A module of kernels beside this one, which imports Triton."""
    return importlib.import_module(f"halve.kernels.{name}")


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU: make that the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain() -> bool:
    """Whether Triton interprets its kernels, which has no assembly and multiplies bfloat16 wrongly."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def pdl() -> bool:
    """Whether a kernel may start while the one before it drains (programmatic dependent launch, Hopper and later)."""
    return os.environ.get("HALVE_PDL", "0") not in ("", "0")


@dataclass(frozen=True)
class Tiling:
    """Sizes a launch runs with: output rows of a tile, parts the columns are split into, warps of a program, segments
    whose loads are underway at once."""

    rows: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


def tiling(operand: Operand) -> Tiling:
    """The tile sizes for a weight: those measured for a shape like its own if there are any, else by rule of thumb."""
    like = [key for key in _measured() if key[0] == operand.bits and _factor(key, operand) < 2]
    if like:
        return _measured()[min(like, key=lambda key: _factor(key, operand))]
    rows = 64 if operand.bits == 16 else 128
    # about three programs to a multiprocessor (an H100 has 132), each with some segments to be underway
    parts = min(8, operand.segments // 4, 396 // -(-operand.rows // rows))
    return Tiling(rows, max(1, parts), stages=4 if operand.data.element_size() <= 2 else 2)


def _factor(key: tuple[int, int, int], operand: Operand) -> float:
    """How far a measured shape is from a weight's: 1 where they are the same."""
    ratios = (key[1] / operand.columns, key[2] / operand.rows)
    return math.prod(max(ratio, 1 / ratio) for ratio in ratios)


def tiling_key(operand: Operand) -> str:
    """The name of a weight's shape in a file of tilings."""
    return f"{operand.bits}bit-{operand.columns}x{operand.rows}"


@functools.cache
def _measured() -> dict[tuple[int, int, int], Tiling]:
    """Tilings by bits, columns and rows."""
    path = os.environ.get(_TUNED)
    if not path:
        return {}
    try:
        tilings = json.loads(Path(path).read_text(encoding="utf-8"))["tilings"]
        return {tuple(map(int, re.findall(r"\d+", key))): Tiling(*sizes) for key, sizes in tilings.items()}  # type: ignore[misc]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HalveError(
            f"{_TUNED}={path} is no file of tilings ({type(error).__name__}: {error}): unset it, or make one with "
            "benchmarks/gpu.sh tune"
        ) from error


@dataclass
class Scratch:
    """Memory that split products meet in: parts of sums, and counters that are 0 between launches."""

    device: torch.device
    partial: Tensor = field(init=False)
    arrived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=self.device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=self.device)

    def reserve(self, operand: Operand, count: int, sizes: Tiling) -> None:
        """Make room for a product. Memory that grows moves, so this comes before a capture."""
        parts, tiles = split(operand, sizes)[0], tiles_of(operand, sizes)
        partial = parts * count * operand.rows if parts > 1 else 0
        if self.partial.numel() < partial:
            self.partial = torch.empty(partial, dtype=torch.float32, device=self.device)
        if self.arrived.numel() < tiles:
            self.arrived = torch.zeros(tiles, dtype=torch.int32, device=self.device)


@functools.cache
def shared_scratch(device: torch.device) -> Scratch:
    """For products outside of a captured step."""
    return Scratch(device)


@dataclass(frozen=True)
class NormedInput:
    """A vector x [M, D] behind a norm as its readers get it: norm and gathering are done when they load it.

    vectors [M, ...]: what each reads, side by side; place int32 [F, D]: where entries go in the vectors, -1 nowhere
    (None: one vector, each where it is); gain [D] and eps: the RMSNorm in between; squares float32 [M, tiles of the
    maker]: sums of squares of x.
    """

    vectors: Tensor
    place: Tensor | None
    gain: Tensor
    squares: Tensor
    eps: float


@dataclass(frozen=True)
class Fusion:
    """What is done around a product, all of it optional (see `triton_matmul`).

    norm: what x is the vectors of, if there is a norm to finish; bias [O]; place int32 [O]: output i goes to out[place[i]],
    nowhere if that is -1; epilogue and activation: numbers of `triton_matmul`; gate [M, ...]: what TIMES multiplies by;
    next_input: who reads the residual stream next; best float32 and best_row int32 [M, tiles]: each tile's largest output and
    its row.
    """

    norm: NormedInput | None = None
    bias: Tensor | None = None
    place: Tensor | None = None
    epilogue: int = 0
    activation: int = 0
    gate: Tensor | None = None
    next_input: NormedInput | None = None
    best: Tensor | None = None
    best_row: Tensor | None = None


def tiles_of(operand: Operand, sizes: Tiling) -> int:
    """Tiles of output rows in a launch."""
    return -(-operand.rows // sizes.rows)


def split(operand: Operand, sizes: Tiling) -> tuple[int, int]:
    """Parts of the columns, none of them empty, and segments of a part."""
    segments = -(-operand.segments // sizes.parts)
    return -(-operand.segments // segments), segments


def multiply(operand: Operand, x: Tensor, out: Tensor, fusion: Fusion, scratch: Scratch, sizes: Tiling) -> None:
    """out [M, ...] = the fused product with x [M, stored columns] in the weight's order, M <= 16; both of unit stride in
    their last dimension."""
    kernels = load_kernels("triton_matmul")
    count = x.shape[0]
    assert 0 < count <= MAX_ROWS and x.stride(1) == 1 and out.stride(1) == 1 and x.shape[1] == operand.stored_columns
    tiles, (parts, segments_a_part) = tiles_of(operand, sizes), split(operand, sizes)
    scratch.reserve(operand, count, sizes)
    norm = fusion.norm
    following = fusion.next_input
    written: list[Tensor | None] = [None] * 4
    if following is not None:
        written = [following.gain, following.vectors, following.place, following.squares]
    tensors = [
        None if norm is None else norm.squares, operand.data, operand.scale, operand.zero, operand.piece_map, fusion.bias,
        out, fusion.place, fusion.gate, *written, fusion.best, fusion.best_row,
        scratch.partial if parts > 1 else None, scratch.arrived,
    ]  # fmt: skip
    kernels.product[(tiles, parts)](
        x, *[operand.data if t is None else t for t in tensors],
        count, operand.rows, operand.columns, operand.segments, operand.groups,
        1 if norm is None else norm.gain.shape[0], 0 if norm is None else norm.squares.shape[1], tiles, parts,
        segments_a_part, x.stride(0), operand.columns, out.stride(0),
        0 if fusion.gate is None else fusion.gate.stride(0), 0 if following is None else following.vectors.stride(0),
        0.0 if norm is None else norm.eps,
        UNEVEN=operand.bits == 16 and operand.stored_columns > operand.columns, NORM=norm is not None,
        EPILOGUE=fusion.epilogue, ACTIVATION=fusion.activation, HAS_BIAS=fusion.bias is not None,
        PLACED=fusion.place is not None, BEST=fusion.best is not None, SPLIT=parts > 1, PLAIN=plain(), N=sizes.rows,
        STAGES=sizes.stages, M=MAX_ROWS, **_reader_options(following), **_layout_options(operand, plain(), x.dtype),
        **launch_options(sizes.warps),
    )  # fmt: skip


def write_normed_input(source: Tensor, token: Tensor | None, x: Tensor, to: NormedInput) -> None:
    """Write x [M, D] for its readers; it is there, or is filled with the rows `token` int64 [M] of `source` [V, D]."""
    kernels = load_kernels("triton_matmul")
    kernels.write_for_readers[(x.shape[0],)](
        source, x if token is None else token, x, to.gain, to.vectors, x if to.place is None else to.place, to.squares,
        x.shape[1], to.vectors.stride(0), EMBED=token is not None, BLOCK=1024, **_reader_options(to), **launch_options(4),
    )  # fmt: skip


def launch_options(warps: int) -> dict[str, Any]:
    """Options that every launch of a step takes."""
    return {"PDL": pdl(), "num_warps": warps, "enable_fp_fusion": True, **({"launch_pdl": True} if pdl() else {})}


def _reader_options(written: NormedInput | None) -> dict[str, Any]:
    if written is None:
        return {"READERS": 0, "READERS_PLACED": False}
    readers = 1 if written.place is None else written.place.shape[0]
    return {"READERS": readers, "READERS_PLACED": written.place is not None}


def _base(bits: int, plain: bool, dtype: torch.dtype) -> float:
    """What stands for the code 0 where a kernel has a code as a number: the offset that codes below 8 bits are stored with,
    and what they are the lowest digits of when two are expanded at once."""
    if bits >= 8:
        return 0.0
    lifted = {torch.bfloat16: 128.0, torch.float16: 1024.0}
    return (1 << (bits - 1)) + (0.0 if plain else lifted.get(dtype, 0.0))


def _layout_options(operand: Operand, plain: bool, dtype: torch.dtype) -> dict[str, Any]:
    per, chunks = operand.per, operand.chunks_a_group
    ragged = operand.piece_map is not None
    return {
        "BITS": operand.bits,
        "BASE": _base(operand.bits, plain, dtype),
        "PER": per,
        "E": operand.elements,
        "CHUNKS_A_GROUP": chunks,
        "RUN": 1 if ragged else math.gcd(per, chunks) if chunks else 0,
        "PIECES": operand.elements // PIECE if ragged else 1,
        "HAS_ZERO": operand.zero is not None,
    }


def expand_rows(operand: Operand, first: int, out: Tensor) -> None:
    """Rows `first`, first + 1, ... of a packed weight as numbers into out [rows, stored columns]."""
    kernels = load_kernels("triton_matmul")
    assert operand.scale is not None
    last = min(operand.rows, first + out.shape[0])
    kernels.expand[(-(-(last - first) // 32), operand.segments)](
        operand.data, *[operand.data if t is None else t for t in (operand.scale, operand.zero, operand.piece_map)],
        out, first, last, operand.rows, operand.segments, operand.groups, out.stride(0), N=32, num_warps=4,
        **_layout_options(operand, True, out.dtype),
    )  # fmt: skip


def look_up(operand: Operand, rows: Tensor, out: Tensor) -> None:
    """Rows `rows` int64 [M] of a packed weight as numbers into out [M, columns], the weight's own order; they have to be
    there."""
    kernels = load_kernels("triton_matmul")
    assert operand.scale is not None and out.shape == (rows.shape[0], operand.columns) and out.is_contiguous()
    tensors = [
        operand.data if t is None else t for t in (operand.scale, operand.zero, operand.piece_map, operand.order)
    ]
    kernels.look_up[(rows.shape[0], operand.segments)](
        rows, operand.data, *tensors, out, operand.rows, operand.columns, operand.segments, operand.groups,
        ORDERED=operand.order is not None, **_layout_options(operand, True, out.dtype), **launch_options(4),
    )  # fmt: skip


class TritonMatmul:
    """Products on a GPU: up to 16 rows of x by the fused kernels, more by torch's matmul (tensor cores), to which packed
    weights go expanded tile by tile."""

    def __init__(self, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
        if isinstance(weight, Tensor):
            self.operand = dense_operand(weight)
            self.weight: Tensor | SegmentedWeight = self.operand.data
            self.kernel = f"triton-{_DTYPES[weight.dtype]}"
        else:
            self.weight = SegmentedWeight.of(weight)
            self.operand = self.weight.operand
            self.kernel = f"triton-int{weight.spec.bits}"

    @classmethod
    def serves(cls, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> str | None:
        if not runs_on(weight.device):
            return f"the weight is on {weight.device}"
        if missing():
            return missing()
        if dtype not in _DTYPES or (isinstance(weight, Tensor) and weight.dtype not in _DTYPES):
            return f"computes in float32, bfloat16 and float16, not {dtype}"
        if isinstance(weight, QuantizedWeight) and weight.spec.bits not in STORED_BITS:
            return f"reads codes of {', '.join(map(str, STORED_BITS))} bits, not {weight.spec.bits}"
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            return "the weight is empty"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        operand = self.operand
        with current(x.device):
            if rows.shape[0] > MAX_ROWS:
                return self._many(rows).view(*x.shape[:-1], operand.rows)
            out = x.new_empty((*x.shape[:-1], operand.rows))
            if rows.shape[0]:
                arranged = operand.arranged(rows).contiguous()
                flat, scratch = out.view(-1, operand.rows), shared_scratch(x.device)
                multiply(operand, arranged, flat, Fusion(), scratch, tiling(operand))
        return out

    def _many(self, x: Tensor) -> Tensor:
        operand = self.operand
        if isinstance(self.weight, Tensor):
            return functional.linear(x, self.weight.to(x.dtype))
        x = operand.arranged(x)
        tile_rows = max(1, min(operand.rows, _TILE_BYTES // (operand.stored_columns * x.element_size())))
        tile = x.new_empty((tile_rows, operand.stored_columns))
        out = x.new_empty((x.shape[0], operand.rows))
        for first in range(0, operand.rows, tile_rows):
            size = min(tile_rows, operand.rows - first)
            expand_rows(operand, first, tile[:size])
            out[:, first : first + size] = x @ tile[:size].t()
        return out
