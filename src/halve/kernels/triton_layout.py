"""How weights lie in memory for the Triton kernels, and the way back.

Dense weights stay as they are. Packed ones are held once, as the kernels read them (see `triton_matmul`), 3-bit codes in
4 bits. A chunk of a segment never crosses a group; where groups do not divide into chunks, columns are sorted by group,
each group is filled up to a multiple of 8 columns, and every 8 columns of a chunk have their own scale.

Shape legend: O output rows, I columns of the stored weight, C stored columns (I and padding), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halve.kernels.prepared import PreparedWeight
from halve.quantization import QuantizedWeight, QuantSpec, dequantize, unpack

STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
_DENSE_COLUMNS = 128  # columns of a floating weight that a step of the kernel takes
_BLOCK_ROWS = 16  # rows of a packed weight that lie together
_LEAST = 16  # columns that the tensor cores multiply at once: the least size of a chunk
PIECE = 8  # columns that ragged groups are filled up to a multiple of
_ROWS_AT_A_TIME = 2048  # rows repacked at once: bounds the copies while a model loads


@dataclass(frozen=True)
class Operand:
    """One weight [O, I] as the kernels read it.

    data: floating [O, I], int8 (8 bits) or int16 [blocks of 16 rows, segments, 16, E]; scale, and zero (int8, below 8 bits
    int16) or None, [G, O]; piece_map int32 [pieces] or None: the group of every 8 stored columns, where chunks do not have
    one each; order int32 [C] or None: the column of the weight that stands at a stored place, -1 for padding (None: as they
    are, padding at the end).
    """

    data: Tensor
    bits: int
    rows: int
    columns: int
    elements: int = _DENSE_COLUMNS
    segments: int = 0
    chunks_a_group: int = 0
    scale: Tensor | None = None
    zero: Tensor | None = None
    piece_map: Tensor | None = None
    order: Tensor | None = None

    @property
    def per(self) -> int:
        """Codes in one element of `data`: chunks of a segment."""
        return _codes_an_element(self.bits)

    @property
    def stored_columns(self) -> int:
        return self.segments * self.per * self.elements

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        tensors = (self.data, self.scale, self.zero, self.piece_map, self.order)
        return sum(t.nbytes for t in tensors if t is not None)

    def places(self, kept: Tensor | None, width: int) -> Tensor | None:
        """Where each entry of x [width] goes in the stored order, int32, -1 where it is not used; `kept` [I] are the
        entries that are inputs of the weight (None: all). None: each where it is."""
        if kept is None and self.order is None:
            return None
        inputs = torch.arange(self.columns, device=self.data.device) if kept is None else kept
        stored = torch.arange(self.columns, dtype=torch.int32, device=self.data.device)
        if self.order is not None:
            filled = (self.order >= 0).nonzero().flatten()
            stored[self.order[filled].long()] = filled.to(torch.int32)
        places = torch.full((width,), -1, dtype=torch.int32, device=self.data.device)
        places[inputs.long()] = stored
        return places

    def arranged(self, x: Tensor) -> Tensor:
        """x [M, I] in the stored order, [M, stored columns]."""
        if self.order is not None:
            return x.index_select(1, self.order.clamp(min=0).long()) * (self.order >= 0)
        return functional.pad(x, (0, self.stored_columns - self.columns)) if self.stored_columns > self.columns else x


def _codes_an_element(bits: int) -> int:
    return 1 if bits >= 8 else 16 // bits


def dense_operand(weight: Tensor) -> Operand:
    """A floating weight [O, I], shared and not copied (unless it is a strided view)."""
    rows, columns = weight.shape
    return Operand(weight.contiguous(), 16, rows, columns, segments=-(-columns // _DENSE_COLUMNS))


def packed_operand(weight: QuantizedWeight) -> Operand:
    """A packed weight, its codes laid out anew, some rows at a time."""
    bits, columns, groups = STORED_BITS[weight.spec.bits], weight.in_features, weight.scale.shape[1]
    per = _codes_an_element(bits)
    most, order, piece_map, chunks_a_group = 128 // per, None, None, 0
    if groups == 1 and weight.group_index is None:
        elements, stored = most, columns
    elif weight.group_index is None and _power_of_two_in(columns // groups) >= _LEAST:
        elements, stored = min(most, _power_of_two_in(columns // groups)), columns
        chunks_a_group = columns // groups // elements
    else:  # groups are filled up to whole pieces; a chunk holds pieces of several groups
        elements = 32 if per == 1 else _LEAST
        sizes = torch.bincount(weight.column_groups(), minlength=groups)
        pieces = -(-sizes // PIECE)
        pieces[-1] += -pieces.sum() % (per * elements // PIECE)  # the last one up to a whole segment
        order, stored = _order(weight.column_groups(), sizes, pieces * PIECE), int(pieces.sum()) * PIECE
        piece_map = torch.repeat_interleave(torch.arange(groups, device=weight.device), pieces).to(torch.int32)
    segments = -(-stored // (per * elements))
    data = _lay_out(weight, bits, elements, segments, order)
    scale, zero = (None if t is None else t.t().contiguous() for t in (weight.scale, weight.zero))
    if zero is not None and bits < 8:
        # as wide as the elements: Triton would lay the product out for bytes where a byte goes into it
        zero = zero.to(torch.int16)
    return Operand(
        data, bits, weight.out_features, columns, elements, segments, chunks_a_group, scale, zero, piece_map, order
    )


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


def _lay_out(weight: QuantizedWeight, bits: int, elements: int, segments: int, order: Tensor | None) -> Tensor:
    """The codes of a weight as `Operand.data`."""
    per = _codes_an_element(bits)
    blocks, stored = -(-weight.out_features // _BLOCK_ROWS), segments * per * elements
    kind = torch.int8 if bits == 8 else torch.int16
    data = torch.empty(blocks, segments, _BLOCK_ROWS, elements, dtype=kind, device=weight.device)
    for first in range(0, weight.out_features, _ROWS_AT_A_TIME):
        codes = unpack(weight.packed[first : first + _ROWS_AT_A_TIME], weight.spec.bits, weight.in_features)
        if order is not None:
            codes = codes.index_select(1, order.clamp(min=0).long())
        codes = functional.pad(codes, (0, stored - codes.shape[1], 0, -codes.shape[0] % _BLOCK_ROWS))
        chunks = codes.view(-1, _BLOCK_ROWS, segments, per, elements).transpose(1, 2)
        block = data[first // _BLOCK_ROWS :][: chunks.shape[0]]
        if bits == 8:
            block.copy_(chunks[:, :, :, 0])
            continue
        block.zero_()
        for c in range(per):  # 3-bit codes are kept with the offset of 4 bits
            block |= (chunks[:, :, :, c].to(torch.int16) + (1 << (bits - 1))) << (bits * c)
    return data


@dataclass(frozen=True)
class SegmentedWeight(PreparedWeight):
    """A packed weight as the Triton kernels read it."""

    spec: QuantSpec
    shape: tuple[int, int]
    group_index: Tensor | None
    operand: Operand

    @classmethod
    def of(cls, weight: QuantizedWeight) -> SegmentedWeight:
        return cls(weight.spec, weight.shape, weight.group_index, packed_operand(weight))

    @property
    def device(self) -> torch.device:
        return self.operand.data.device

    @property
    def nbytes(self) -> int:
        return self.operand.nbytes + (0 if self.group_index is None else self.group_index.nbytes)

    def scale(self) -> Tensor:
        assert self.operand.scale is not None
        return self.operand.scale.t().contiguous()

    def zero(self) -> Tensor | None:
        return None if self.operand.zero is None else self.operand.zero.t().contiguous().to(torch.int8)

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        scale, zero = (None if t is None else t[:, index].t() for t in (self.operand.scale, self.operand.zero))
        assert scale is not None
        codes = self._codes(self.operand.data[index // _BLOCK_ROWS, :, index % _BLOCK_ROWS])
        return dequantize(codes, scale, zero, self.group_index).to(dtype)

    def codes(self) -> Tensor:
        return self._codes(self.operand.data.transpose(1, 2).flatten(0, 1)[: self.shape[0]])

    def _codes(self, stored: Tensor) -> Tensor:
        """Signed codes, int8 [N, I], of rows as they are stored, [N, segments, E]."""
        operand, columns = self.operand, self.shape[1]
        stored = stored.unsqueeze(2)
        if operand.bits < 8:
            shift = operand.bits * torch.arange(operand.per, dtype=torch.int16, device=stored.device).view(-1, 1)
            stored = ((stored >> shift) & ((1 << operand.bits) - 1)) - (1 << (operand.bits - 1))
        stored = stored.to(torch.int8).flatten(1)
        if operand.order is None:
            return stored[:, :columns].contiguous()
        filled = operand.order >= 0
        codes = torch.empty(stored.shape[0], columns, dtype=torch.int8, device=stored.device)
        codes[:, operand.order[filled].long()] = stored[:, filled]
        return codes
