"""The number format of quantized weights: scale, zero point, codes, packing. Defined here and nowhere else.

Shape legend: O output features, I input features, G groups along I, W int32 words along I.

The stored form is that of compressed-tensors `pack-quantized` (docs/formats.md): signed codes q in
[-2^(b-1), 2^(b-1)-1] stored as q + 2^(b-1), packed least significant first along I; w ~ (q - zero) * scale.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import HalveError, RecipeError

PACKABLE_BITS = (2, 3, 4, 8)
_CHUNK_CODES = 1 << 24  # codes packed at a time: bounds the int32 copies to 64 MB each


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is quantized.

    `group_size` counts input columns that share a scale; -1 is one scale per output row (per channel).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in PACKABLE_BITS:
            raise RecipeError(f"bits={self.bits} is not supported: use one of {', '.join(map(str, PACKABLE_BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(f"group_size={self.group_size} must be -1 (per channel) or a positive number of columns")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def columns_per_group(self, in_features: int) -> int:
        """Input columns under one scale for a weight of `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def divides(self, in_features: int) -> bool:
        return in_features % self.columns_per_group(in_features) == 0


def fitting_group_sizes(in_features: int, smallest: int = 8) -> list[int]:
    """Group sizes (largest first) that divide `in_features`, to be named in errors."""
    return [g for g in range(in_features, smallest - 1, -1) if in_features % g == 0]


def scale_and_zero(weight_ORG: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Min-max scale and zero point over the last dimension.

    `weight_ORG` [..., columns] float32 -> scale [...] in `scale_dtype`, zero int8 [...] or None when symmetric.
    symmetric: scale = max|w| / ((2^b - 1) / 2); asymmetric: scale = (max(w,0) - min(w,0)) / (2^b - 1) and the
    zero point is the code that stands for 0. The scale is rounded to the stored dtype before any code is computed,
    so that what is stored is what was used. A group of zeros gets scale 1: its codes are the zero point exactly.
    """
    steps = float((1 << spec.bits) - 1)
    if spec.symmetric:
        span = weight_ORG.abs().amax(-1) * 2
    else:
        low, high = weight_ORG.amin(-1).clamp(max=0), weight_ORG.amax(-1).clamp(min=0)
        span = high - low
    scale = (span / steps).to(scale_dtype)
    # a span below the smallest stored number underflows to 0: treat it as a group of zeros
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if not torch.isfinite(scale).all():
        raise RecipeError(f"a weight is too large for a {scale_dtype} scale: use --dtype fp32 or bf16")
    if spec.symmetric:
        return scale, None
    zero = (spec.qmin - (low / scale.float()).round()).clamp(spec.qmin, spec.qmax)
    return scale, zero.to(torch.int8)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest codes, as int8: round(w / scale) + zero, clamped. All shapes broadcast."""
    return _nearest(weight, scale, zero, spec).to(torch.int8)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The numbers that the nearest codes stand for, float32: decode(encode(...)) without the codes themselves."""
    q = _nearest(weight, scale, zero, spec)
    return (q if zero is None else q.sub_(zero)).mul_(scale.float())


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest codes as float32, in memory of their own."""
    q = (weight / scale.float()).round_()
    if zero is not None:
        q += zero
    return q.clamp_(spec.qmin, spec.qmax)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """(q - zero) * scale in float32. All shapes broadcast."""
    q = codes.float() if zero is None else codes.float() - zero.float()
    return q * scale.float()


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, group_index_I: Tensor | None) -> Tensor:
    """The numbers that a weight's codes stand for, float32 [O, I]. Groups are equal runs of columns unless each column
    has its own, `group_index_I`."""
    if group_index_I is None:
        shaped = codes_OI.view(codes_OI.shape[0], scale_OG.shape[1], -1)
        zero = None if zero_OG is None else zero_OG.unsqueeze(-1)
        return decode(shaped, scale_OG.unsqueeze(-1), zero).view(codes_OI.shape)
    groups = group_index_I.long()
    return decode(codes_OI, scale_OG[:, groups], None if zero_OG is None else zero_OG[:, groups])


def _bit_positions(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For 32 codes in a row: first word, bit offset inside it, and which codes run over into the next word."""
    start = torch.arange(32, device=device, dtype=torch.int32) * bits
    word, offset = start // 32, start % 32
    return word.long(), offset, (offset + bits > 32).nonzero().flatten()


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Signed int8 codes [O, I] -> int32 words [O, ceil(I*b/32)]: one dense bit stream a row, least significant first."""
    rows, columns = codes_OI.shape
    blocks = -(-columns // 32)
    word, offset, over = _bit_positions(bits, codes_OI.device)
    packed = torch.zeros(rows, blocks, bits, dtype=torch.int32, device=codes_OI.device)
    step = max(1, _CHUNK_CODES // max(1, columns))
    for first in range(0, rows, step):
        part = codes_OI[first : first + step].to(torch.int32) + (1 << (bits - 1))
        part = torch.nn.functional.pad(part, (0, blocks * 32 - columns)).view(-1, blocks, 32)
        out = packed[first : first + step]
        out.index_add_(-1, word, part << offset)  # bits never overlap, so adding is or-ing
        if over.numel():
            out.index_add_(-1, word[over] + 1, part[..., over] >> (32 - offset[over]))
    return packed.view(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def unpack(packed_OW: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [O, W] -> signed int8 codes [O, columns]; the inverse of `pack`."""
    rows, words = packed_OW.shape
    if 8 % bits == 0 and sys.byteorder == "little":
        # no code crosses a byte: taken from the bytes as they lie, six times faster than from words
        shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_OW.device)
        stored = packed_OW.contiguous().view(torch.uint8).unsqueeze(-1) >> shift
        stored = stored.bitwise_and_((1 << bits) - 1).view(torch.int8).sub_(1 << (bits - 1))
        return stored.view(rows, -1)[:, :columns].contiguous()
    blocks = -(-columns // 32)
    word, offset, over = _bit_positions(bits, packed_OW.device)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed_OW.device)
    step = max(1, _CHUNK_CODES // max(1, columns))
    for first in range(0, rows, step):
        part = torch.nn.functional.pad(packed_OW[first : first + step], (0, blocks * bits - words))
        part = part.view(-1, blocks, bits)
        # the shift keeps the sign, so bits that come from above are masked off before codes are put together
        low_bits = torch.clamp(32 - offset, max=bits)
        value = (part[..., word] >> offset) & ((1 << low_bits) - 1)
        if over.numel():
            value[..., over] |= (part[..., word[over] + 1] << (32 - offset[over])) & ((1 << bits) - 1)
        value -= 1 << (bits - 1)
        codes[first : first + step] = value.view(-1, blocks * 32)[:, :columns]
    return codes


@dataclass(frozen=True)
class QuantizedWeight:
    """A packed weight [O, I] of `spec.bits` bits.

    packed int32 [O, W]; scale [O, G] floating; zero int8 [O, G] or None (symmetric);
    group_index int32 [I] or None: which group a column belongs to, only when columns were removed from a
    weight quantized before (ragged groups); otherwise column // columns_per_group.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    in_features: int
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        rows, words = self.packed.shape[0], -(-self.in_features * self.spec.bits // 32)
        groups = (None if t is None else t.shape for t in (self.scale, self.zero))
        fits = self.packed.shape == (rows, words) and all(
            s is None or s == (rows, self.scale.shape[-1]) for s in groups
        )
        if not fits or (self.group_index is not None and self.group_index.shape != (self.in_features,)):
            shapes = {name: list(t.shape) for name, t in vars(self).items() if isinstance(t, Tensor)}
            raise HalveError(f"no weight of {self.in_features} columns in {self.spec.bits} bits: {shapes}")

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the weight, as stored."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero, self.group_index) if t is not None)

    def codes(self) -> Tensor:
        """Signed codes, int8 [O, I]."""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def column_groups(self) -> Tensor:
        """Group of each column, int64 [I]. Raises HalveError where one has no scale."""
        if self.group_index is not None:
            groups = self.group_index.long()
            if int(groups.min()) < 0 or int(groups.max()) >= self.scale.shape[1]:
                raise HalveError(f"group_index points outside of the {self.scale.shape[1]} groups that have scales")
            return groups
        columns = torch.arange(self.in_features, device=self.device)
        return columns // self.spec.columns_per_group(self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the codes stand for, [O, I] in `dtype` (computed in float32)."""
        return dequantize(self.codes(), self.scale, self.zero, self.group_index).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        moved = (None if t is None else t.to(device) for t in (self.packed, self.scale, self.zero, self.group_index))
        packed, scale, zero, group_index = moved
        assert packed is not None and scale is not None
        return QuantizedWeight(packed, scale, zero, self.spec, self.in_features, group_index)

    def rows(self, index: Tensor) -> QuantizedWeight:
        """The weight with only the output rows `index` (int64 [kept])."""
        zero = None if self.zero is None else self.zero[index]
        return QuantizedWeight(
            self.packed[index], self.scale[index], zero, self.spec, self.in_features, self.group_index
        )

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers of some rows (int64 [N]), [N, I] in `dtype`; only they are expanded."""
        return self.rows(index).dequantize(dtype)

    def columns(self, index: Tensor) -> QuantizedWeight:
        """The weight with only the input columns `index` (int64 [kept]); groups become ragged, scales of emptied groups go."""
        codes = self.codes()[:, index]
        groups = self.column_groups()[index]
        used, group_index = torch.unique(groups, return_inverse=True)
        zero = None if self.zero is None else self.zero[:, used]
        ragged = None if self.spec.group_size == -1 else group_index.to(torch.int32)
        packed = pack(codes, self.spec.bits)
        return QuantizedWeight(packed, self.scale[:, used], zero, self.spec, index.numel(), ragged)


def from_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, group_index: Tensor | None = None
) -> QuantizedWeight:
    """Pack int8 codes [O, I] with their scale [O, G] and zero [O, G]."""
    return QuantizedWeight(pack(codes, spec.bits), scale, zero, spec, codes.shape[1], group_index)


def quantize(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Round every weight to its nearest code (round-to-nearest), scales from the group's min and max.

    weight [O, I] floating; scales are kept in `scale_dtype` (default: the weight's dtype). Raises RecipeError when
    the group size does not divide I.
    """
    rows, columns = weight.shape
    if not spec.divides(columns):
        raise RecipeError(
            f"group_size={spec.group_size} does not divide {columns} input columns: "
            f"use -1 (per channel) or one of {fitting_group_sizes(columns)}"
        )
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales, zeros = [], []
    step = max(1, _CHUNK_CODES // columns)
    for first in range(0, rows, step):
        grouped = (
            weight[first : first + step]
            .float()
            .view(-1, columns // spec.columns_per_group(columns), spec.columns_per_group(columns))
        )
        scale, zero = scale_and_zero(grouped, spec, scale_dtype or weight.dtype)
        wide_zero = None if zero is None else zero.unsqueeze(-1)
        codes[first : first + step] = encode(grouped, scale.unsqueeze(-1), wide_zero, spec).flatten(1)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return from_codes(codes, torch.cat(scales), torch.cat(zeros) if zeros else None, spec)


def pack_zero(zero_OG: Tensor, bits: int) -> Tensor:
    """Zero points int8 [O, G] -> int32 [ceil(O*b/32), G], packed along O (compressed-tensors' packed_dim=0)."""
    return pack(zero_OG.t().contiguous(), bits).t().contiguous()


def unpack_zero(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_zero`: int8 [rows, G]."""
    return unpack(packed.t().contiguous(), bits, rows).t().contiguous()
