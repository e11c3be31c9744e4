"""Products with packed and dense weights in C: few rows of x at the speed of memory, many without expanding a weight.

The kernels and their layout are described in csrc/cpu.h. The library is optional: where no compiler was found when
halve was installed, or HALVE_NO_C=1 is set, `serves` says so and the reference backend runs.

Shape legend: N rows of x, O output rows, I input columns, C stored columns (I and padding), G groups, W words of 32
bits a row, B blocks of 16 output rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from halve.errors import HalveError, StaleKernelsError
from halve.kernels.prepared import PreparedWeight
from halve.kernels.structures import MAX_SEGMENT, ROWS, WeightStruct, bind
from halve.quantization import QuantizedWeight, QuantSpec

PATH = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")  # of the library, where it was built
MAX_ROWS = 16  # rows of x beyond which torch's matmul takes over, where it is faster (see CpuMatmul)
_TILE_BYTES = 4 << 20  # expanded weights at a time: small against the cache, large enough for torch's matmul
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


class Library:
    """The C functions, for one instruction set."""

    def __init__(self, path: Path, isa: str | None) -> None:
        """Load `path` for instruction set `isa` (None: the best one here). Raises OSError when that cannot be, and
        StaleKernelsError when it was built from other sources."""
        library = ctypes.CDLL(str(path))
        bind(library)
        self.kernels: int | None = library.halve_cpu_kernels(None if isa is None else isa.encode())
        if self.kernels is None:
            raise OSError(f"this processor has no {isa}")
        self.isa: str = library.halve_cpu_name(self.kernels).decode()
        library.halve_cpu_set_threads(*_torch_threads())
        self.has_bf16 = bool(library.halve_cpu_has_bf16())
        self.has_tiles = bool(library.halve_cpu_has_tiles())
        self.multiply = library.halve_cpu_multiply
        self.expand = library.halve_cpu_expand
        self.pack = library.halve_cpu_pack
        self.look_up = library.halve_cpu_look_up
        self.step = library.halve_step
        self.step_check = library.halve_step_check
        self.step_scratch = library.halve_step_scratch
        self._check = library.halve_cpu_check
        self._large_pages = library.halve_cpu_large_pages

    def check(self, weight: WeightStruct) -> None:
        """HalveError unless the sizes and indices of a weight fit together: the kernels trust them."""
        if (reason := self._check(ctypes.byref(weight))) is not None:
            raise HalveError(
                f"a weight [{weight.rows}, {weight.in_features}] is not one the C kernels can read: {reason.decode()}"
            )

    def large_pages(self, tensor: Tensor, filled: bool) -> None:
        """Put memory that every step reads on large pages where the system can; `filled`: it has contents already."""
        self._large_pages(tensor.data_ptr(), tensor.nbytes, filled)


def _torch_threads() -> tuple[int | None, int | None]:
    """Addresses of the functions that start and count the threads of torch's own OpenMP runtime, or None: one thread.

    A second runtime would bring a second pool, whose idle threads spin on the cores the first one needs.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            library = ctypes.CDLL(str(path))
            names = ("GOMP_parallel", "omp_get_num_threads")
            if all(hasattr(library, function) for function in names):
                start, count = (ctypes.cast(getattr(library, f), ctypes.c_void_p).value for f in names)
                return start, count
    return None, None


@functools.cache
def load_library() -> Library | str:
    """The C library for the best instruction set of this processor, or in one line why there is none to run."""
    return open_library(None)


def open_library(isa: str | None) -> Library | str:
    """The C library built beside this module, for one instruction set (None: the best one here)."""
    if os.environ.get("HALVE_NO_C", "0") not in ("", "0"):
        return "the C kernels are switched off by HALVE_NO_C"
    if not PATH.is_file():
        return "the C kernels were not built: install halve again where there is a C compiler"
    try:
        return Library(PATH, isa)
    except OSError as error:
        return f"the C kernels do not load: {error}"
    except StaleKernelsError as error:
        return str(error)


@dataclass(frozen=True)
class BlockedWeight(PreparedWeight):
    """A packed weight as the C kernels read it (csrc/cpu.h).

    block_codes int32 [B, W, 16]; block_scales [B, G, 16]; block_zeros uint8 [B, G, 16] or None; order int32 [C] or None;
    segment_end and segment_group int32 [segments].
    """

    spec: QuantSpec
    shape: tuple[int, int]
    group_index: Tensor | None
    scale_dtype: torch.dtype
    block_codes: Tensor
    block_scales: Tensor
    block_zeros: Tensor | None
    order: Tensor | None
    segment_end: Tensor
    segment_group: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight, library: Library) -> BlockedWeight:
        """The blocks of a stored weight, filled by the C side."""
        bits, stored_bits = weight.spec.bits, _STORED_BITS[weight.spec.bits]
        order, segment_end, segment_group = _segments(weight, 32 // stored_bits)
        scale = weight.scale
        if scale.dtype not in KINDS or (scale.dtype == torch.float16 and library.isa == "generic"):
            scale = scale.float()
        zeros = None
        if weight.zero is not None:
            zeros = _in_blocks((weight.zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8))
        codes = torch.empty(-(-weight.out_features // ROWS), int(segment_end[-1]), ROWS, dtype=torch.int32)
        library.large_pages(codes, filled=False)
        made = cls(
            weight.spec, weight.shape, weight.group_index, weight.scale.dtype, codes, _in_blocks(scale), zeros, order,
            segment_end, segment_group,
        )  # fmt: skip
        packed, described = weight.packed.contiguous(), made.describe(library)
        library.check(described)
        if library.pack(ctypes.byref(described), packed.data_ptr(), packed.shape[1], bits, codes.data_ptr()):
            raise HalveError(
                f"rows of {packed.shape[1]} words hold fewer than {weight.in_features} codes of {bits} bits"
            )
        return made

    def describe(self, library: Library) -> WeightStruct:
        """The C side's view; valid as long as this object lives."""
        bits = _STORED_BITS[self.spec.bits]
        words = self.block_codes.shape[1]
        codes, scales, segments = self.block_codes, self.block_scales, (self.segment_end, self.segment_group)
        tensors = (codes, scales, self.block_zeros, self.order, *segments)
        return WeightStruct(
            library.kernels,
            *(None if t is None else t.data_ptr() for t in tensors),
            rows=self.shape[0],
            in_features=self.shape[1],
            columns=words * 32 // bits,
            words=words,
            groups=self.block_scales.shape[1],
            segments=self.segment_end.numel(),
            bits=bits,
            offset=1 << (self.spec.bits - 1),
            scale_kind=KINDS[self.block_scales.dtype],
        )

    @property
    def device(self) -> torch.device:
        return self.block_codes.device

    @property
    def nbytes(self) -> int:
        tensors = (self.block_codes, self.block_scales, self.block_zeros, self.order, self.group_index)
        return sum(t.nbytes for t in tensors if t is not None)

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        library = load_library()
        assert isinstance(library, Library), library
        index, rows = index.contiguous(), torch.empty(index.numel(), self.shape[1])
        if library.look_up(ctypes.byref(self.describe(library)), index.data_ptr(), index.numel(), rows.data_ptr()):
            raise IndexError(f"one of the rows {index.tolist()[:8]} is not among the {self.shape[0]} of the weight")
        return rows.to(dtype)

    def scale(self) -> Tensor:
        return _from_blocks(self.block_scales, self.shape[0]).to(self.scale_dtype)

    def zero(self) -> Tensor | None:
        if self.block_zeros is None:
            return None
        shifted = _from_blocks(self.block_zeros, self.shape[0]).to(torch.int16) - (1 << (self.spec.bits - 1))
        return shifted.to(torch.int8)

    def codes(self) -> Tensor:
        bits, offset = _STORED_BITS[self.spec.bits], 1 << (self.spec.bits - 1)
        rows, columns = self.shape
        shift = torch.tensor([c % 4 * 8 + c // 4 * bits for c in range(32 // bits)], dtype=torch.int32)
        codes = torch.empty(self.shape, dtype=torch.int8)
        for block, words in enumerate(self.block_codes):  # one block at a time: [W, 16] -> [16, C]
            part = ((words.t().unsqueeze(-1) >> shift & ((1 << bits) - 1)) - offset).to(torch.int8).flatten(1)
            first = block * ROWS
            last = min(first + ROWS, rows)
            if self.order is None:
                codes[first:last] = part[: last - first, :columns]
            else:
                filled = self.order >= 0
                codes[first:last, self.order[filled].long()] = part[: last - first, filled]
        return codes


def _in_blocks(values_OG: Tensor) -> Tensor:
    """[O, G] -> [B, G, 16]; rows that fill the last block are 0."""
    rows, groups = values_OG.shape
    padded = functional.pad(values_OG, (0, 0, 0, -rows % ROWS))
    return padded.view(-1, ROWS, groups).transpose(1, 2).contiguous()


def _from_blocks(values_BGR: Tensor, rows: int) -> Tensor:
    """The inverse of `_in_blocks`."""
    return values_BGR.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def _segments(weight: QuantizedWeight, per_word: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """How columns are stored: order [C] (None: as they are), and per segment its end in words and its group.

    Columns of a group lie together, padded to whole words, in segments of at most MAX_SEGMENT columns.
    """
    if weight.group_index is None:
        groups = weight.scale.shape[1]
        sizes = [weight.in_features // groups] * groups
    else:
        sizes = torch.bincount(weight.column_groups(), minlength=weight.scale.shape[1]).tolist()
    ends, segment_groups, word = [], [], 0
    for group, size in enumerate(sizes):
        for start in range(0, size, MAX_SEGMENT):
            word += -(-min(MAX_SEGMENT, size - start) // per_word)
            ends.append(word)
            segment_groups.append(group)
    segments = torch.tensor(ends, dtype=torch.int32), torch.tensor(segment_groups, dtype=torch.int32)
    in_order = weight.group_index is None or bool((weight.group_index.diff() >= 0).all())
    if in_order and word * per_word == weight.in_features:
        return None, *segments
    by_group = torch.argsort(weight.column_groups(), stable=True)
    order = torch.full((word * per_word,), -1, dtype=torch.int32)
    source = target = 0
    for size in sizes:
        order[target : target + size] = by_group[source : source + size]
        source, target = source + size, target + -(-size // per_word) * per_word
    return order, *segments


class CpuMatmul:
    """Packed and dense weights on the CPU through the C library.

    Many rows of x go to torch's matmul for float32, for dense bfloat16 weights where the processor has instructions for
    their products, and for packed ones (expanded tile by tile) where it has matrix units. Elsewhere the C kernels are
    faster for any number of rows: their integer products are as fast as bfloat16 ones and need no expanding.
    """

    def __init__(self, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
        library = load_library()
        assert isinstance(library, Library), library
        self.library = library
        self.weight: Tensor | BlockedWeight
        if isinstance(weight, Tensor):
            self.weight = weight.contiguous()
            library.large_pages(self.weight, filled=True)
            rows, columns = weight.shape
            self._described = WeightStruct(
                library.kernels, self.weight.data_ptr(), rows=rows, in_features=columns, columns=columns,
                dense_kind=KINDS[weight.dtype],
            )  # fmt: skip
            library.check(self._described)
            self.kernel = f"{library.isa}-{'bf16' if weight.dtype == torch.bfloat16 else 'fp32'}"
        else:
            self.weight = BlockedWeight.of(weight, library)
            self._described = self.weight.describe(library)
            self._described.exact = dtype == torch.float32
            self.kernel = f"{library.isa}-int{weight.spec.bits}"
        self.address = ctypes.addressof(self._described)  # of a weight_t, valid as long as this object lives
        self._rows, self._columns = self.weight.shape
        # as stored
        self.columns = int(self._described.columns)
        self.segments = int(self._described.segments)
        # in float32 packed weights are numbers in either way: beyond a few rows torch's matmul makes more of them
        torch_is_faster = library.has_bf16 if isinstance(weight, Tensor) else library.has_tiles
        self._most = MAX_ROWS if dtype == torch.float32 or torch_is_faster else sys.maxsize

    @classmethod
    def serves(cls, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> str | None:
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}"
        library = load_library()
        if isinstance(library, str):
            return library
        if dtype not in (torch.float32, torch.bfloat16):
            return f"computes in float32 and bfloat16, not {dtype}"
        if isinstance(weight, Tensor) and weight.dtype not in (torch.float32, torch.bfloat16):
            return f"reads dense weights in float32 and bfloat16, not {weight.dtype}"
        if isinstance(weight, QuantizedWeight) and weight.spec.bits not in _STORED_BITS:
            return f"reads codes of {', '.join(map(str, _STORED_BITS))} bits, not {weight.spec.bits}"
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            return "the weight is empty"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self._columns or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
            raise HalveError(
                f"x {list(x.shape)} of {x.dtype} on {x.device} does not fit: the weight reads [..., {self._columns}] of "
                "float32 or bfloat16 on the CPU"
            )
        count = x.numel() // self._columns
        if count > self._most:
            return self._by_tiles(x)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._rows))
        if self.library.multiply(self.address, x.data_ptr(), y.data_ptr(), count, KINDS[x.dtype]):
            raise MemoryError("no memory left for the scratch space of a product")
        return y

    def _by_tiles(self, x: Tensor) -> Tensor:
        """Many rows: one tile of the weight at a time as numbers, and torch's matmul."""
        dense = isinstance(self.weight, Tensor)
        if isinstance(self.weight, Tensor) and self.weight.dtype == x.dtype:
            return functional.linear(x, self.weight)
        rows_of_x = x.reshape(-1, self._columns)
        y = x.new_empty((rows_of_x.shape[0], self._rows))
        tile_rows = max(ROWS, _TILE_BYTES // (self._columns * x.element_size()) // ROWS * ROWS)
        tile_rows = min(tile_rows, -(-self._rows // ROWS) * ROWS)
        tile = torch.empty((tile_rows, self._columns) if dense else (self._columns, tile_rows), dtype=x.dtype)
        for first in range(0, self._rows, tile_rows):
            size = min(tile_rows, self._rows - first)
            if isinstance(self.weight, Tensor):
                columns = tile[:size].copy_(self.weight[first : first + size]).t()
            else:
                blocks = -(-size // ROWS)
                kind = KINDS[x.dtype]
                self.library.expand(self.address, first // ROWS, blocks, kind, tile.data_ptr(), tile_rows)
                columns = tile[:, :size]
            y[:, first : first + size] = rows_of_x @ columns
        return y.view(*x.shape[:-1], self._rows)
