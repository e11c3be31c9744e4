"""Triton kernels for products of a few rows of x with a stored weight, and for expanding a packed one.

Each weight byte is read once, 16 bytes a thread, and everything around the product is fused: the input may be normalised
and gathered on the way in; the output may be added to the residual stream, gated, scattered, or reduced to its largest
value. How a weight lies in memory is described in `triton_backend`, which also launches these kernels.

Rows of a weight are outputs. Columns come in segments of SEGMENT columns under one scale, stored as SEGMENT / PER elements
of PER codes each; code j of element e in a segment is column j * SEGMENT / PER + e, so that neighbouring threads read
neighbouring columns of x for every j. A column's place in x is itself, or index[column] (-1: padding, reads 0).

Shape legend: M rows of x (M0 of them real), N output rows of a tile, G segments of a step, E elements of a segment.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

STORE, ADD, GATE, TIMES = 0, 1, 2, 3  # epilogues: see `_finish`


@triton.jit
def _output_rows(tile, rows, EPILOGUE: tl.constexpr, N: tl.constexpr):
    """Weight rows of a tile: in order, or for GATE pairs of a gate row and its up row, half a weight apart."""
    i = tl.arange(0, N)
    if EPILOGUE == 2:
        return (i % 2) * (rows // 2) + tile * (N // 2) + i // 2, tile * (N // 2) + i // 2 < rows // 2
    else:
        return tile * N + i, tile * N + i < rows


@triton.jit
def _load_x(x_ptr, index_ptr, gain_ptr, column, ok, columns, GATHER: tl.constexpr, NORM: tl.constexpr):
    """Input values at stored columns, float32: as they are, and times the gain of the norm."""
    if GATHER:
        place = tl.load(index_ptr + column, mask=ok, other=-1)
        ok = ok & (place >= 0)
    else:
        place = column
        ok = ok & (column < columns)
    x = tl.load(x_ptr + place, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        return x, x * tl.load(gain_ptr + place, mask=ok, other=0.0).to(tl.float32)
    else:
        return x, x


@triton.jit
def _inverse_rms(x_ptr, width, eps, BLOCK: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of one row of x."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.sqrt(tl.sum(total, axis=0) / width + eps)


@triton.jit
def _group_of(segment, map_ptr, ok, PER_CHANNEL: tl.constexpr, SEGMENTS_A_GROUP: tl.constexpr):
    """Which scale a segment has."""
    if PER_CHANNEL:
        return segment * 0
    elif SEGMENTS_A_GROUP > 0:
        return segment // SEGMENTS_A_GROUP
    else:
        return tl.load(map_ptr + segment, mask=ok, other=0)


@triton.jit
def _codes(words, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of int32 words, still raised by 2^(BITS - 1), as whole numbers in float32."""
    return ((words >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """0: silu; 1: gelu by tanh, as x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)); 2: gelu by erf; 3: relu."""
    if ACTIVATION == 0:
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 1:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _finish(
    y, m, m_ok, row, row_ok, tile, rows, out_ptr, bias_ptr, place_ptr, gate_ptr, best_ptr, best_row_ptr,
    out_stride, gate_stride, tiles,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SCATTER: tl.constexpr,
    BEST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs y [M, N], float32, on their way to memory.

    STORE: out = y. ADD: out += y (the residual stream). GATE: out = activation(gate row) * up row. TIMES: out =
    activation(gate) * y with the gate computed before. SCATTER: to out[place[row]]. BEST: also the tile's largest value
    and its row, for each row of x.
    """
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 2:
        gate, up = tl.split(tl.reshape(y, (M, N // 2, 2)))
        at = tile * (N // 2) + tl.arange(0, N // 2)
        ok = m_ok[:, None] & (at < rows // 2)[None, :]
        y2 = _activation(gate, ACTIVATION) * up
        tl.store(out_ptr + m[:, None] * out_stride + at[None, :], y2.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        place = row
        if SCATTER:
            place = tl.load(place_ptr + row, mask=row_ok, other=0)
        ok = m_ok[:, None] & row_ok[None, :]
        to = out_ptr + m[:, None] * out_stride + place[None, :]
        if EPILOGUE == 1:
            y += tl.load(to, mask=ok, other=0.0).to(tl.float32)
        if EPILOGUE == 3:
            gate = tl.load(gate_ptr + m[:, None] * gate_stride + place[None, :], mask=ok, other=0.0).to(tl.float32)
            y = _activation(gate, ACTIVATION) * y
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=ok)
        if BEST:
            # as rounded for the output: equal logits are then equal, and the first of them wins
            seen = tl.where(row_ok[None, :], y.to(out_ptr.dtype.element_ty).to(tl.float32), float("-inf"))
            value = tl.max(seen, axis=1)
            first = tl.min(tl.where(seen == value[:, None], place[None, :], 2147483647), axis=1)
            tl.store(best_ptr + m * tiles + tile, value, mask=m_ok)
            tl.store(best_row_ptr + m * tiles + tile, first, mask=m_ok)


@triton.jit
def matvec(
    x_ptr, gain_ptr, index_ptr, data_ptr, scale_ptr, zero_ptr, map_ptr, out_ptr, bias_ptr, place_ptr, gate_ptr,
    best_ptr, best_row_ptr, partial_ptr, arrived_ptr,
    rows, columns, width, segments, groups, data_stride, out_stride, gate_stride, steps_a_part, tiles, eps,
    one,
    BITS: tl.constexpr, SEGMENT: tl.constexpr, PER: tl.constexpr, SEGMENTS_A_GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr, HAS_ZERO: tl.constexpr, GATHER: tl.constexpr, NORM: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SCATTER: tl.constexpr,
    BEST: tl.constexpr, PDL: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x: multiply-adds in float32 over tiles [N, G, E], reduced once at the end.

    Packed codes become floats without converting integers: put into the top of the mantissa of 1.0 they read
    1 + code / 2^BITS, and what that adds is taken off again through the sum of x. `one` is 1.0 as an integer, an
    argument so that it lies in a register: masking and joining are then one instruction. PARTS > 1 splits the columns
    over programs; the one that arrives last adds the parts up, always in the same order.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    E: tl.constexpr = SEGMENT // PER
    tile, part = tl.program_id(0), tl.program_id(1)
    row, row_ok = _output_rows(tile, rows, EPILOGUE, N)
    data_row = data_ptr + row.to(tl.int64) * data_stride
    acc = tl.zeros((N, G, E), tl.float32)
    square = tl.zeros((G, E), tl.float32)
    if PER_CHANNEL and HAS_ZERO:
        channel_zero = tl.load(zero_ptr + row, mask=row_ok, other=0).to(tl.float32)[:, None, None]
    steps = tl.cdiv(segments, G)
    for step in tl.range(part * steps_a_part, min((part + 1) * steps_a_part, steps), num_stages=STAGES):
        segment = step * G + tl.arange(0, G)
        segment_ok = segment < segments
        element = tl.arange(0, E)
        at = segment[:, None] * E + element[None, :]
        ok = (segment_ok[:, None] & (at < columns)) if BITS == 16 else (segment_ok[:, None] & (at >= 0))
        data = tl.load(
            data_row[:, None, None] + at[None, :, :], mask=row_ok[:, None, None] & ok[None, :, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if BITS == 16:
            raw, x = _load_x(x_ptr, index_ptr, gain_ptr, at, ok, columns, GATHER, NORM)
            square += raw * raw
            acc += data.to(tl.float32) * x[None, :, :]
        else:
            dot = tl.zeros((N, G, E), tl.float32)
            x_sum = tl.zeros((G, E), tl.float32)
            column = segment[:, None] * SEGMENT + element[None, :]
            for j in tl.static_range(PER):
                raw, x = _load_x(x_ptr, index_ptr, gain_ptr, column + j * E, ok, columns, GATHER, NORM)
                square += raw * raw
                bits = (data >> (BITS * j)) << (23 - BITS)
                bits = (bits & (((1 << BITS) - 1) << (23 - BITS))) | one
                dot += bits.to(tl.float32, bitcast=True) * x[None, :, :]
                x_sum += x
            # sum of (code - offset - zero) x / 2^BITS, from that of (1 + code / 2^BITS) x
            x_sum = x_sum[None, :, :]
            if PER_CHANNEL:
                if HAS_ZERO:
                    acc += dot - (1.5 + channel_zero / (1 << BITS)) * x_sum
                else:
                    acc += dot - 1.5 * x_sum
            else:
                group = _group_of(segment, map_ptr, segment_ok, PER_CHANNEL, SEGMENTS_A_GROUP)
                scale_at = row[:, None] * groups + group[None, :]
                scale_ok = row_ok[:, None] & segment_ok[None, :]
                scale = tl.load(scale_ptr + scale_at, mask=scale_ok, other=0.0).to(tl.float32)[:, :, None]
                if HAS_ZERO:
                    zero = tl.load(zero_ptr + scale_at, mask=scale_ok, other=0).to(tl.float32)[:, :, None]
                    acc += (dot - (1.5 + zero / (1 << BITS)) * x_sum) * scale
                else:
                    acc += (dot - 1.5 * x_sum) * scale
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if BITS < 16:
        y *= 1 << BITS
    if PER_CHANNEL:
        y *= tl.load(scale_ptr + row, mask=row_ok, other=0.0).to(tl.float32)
    m = tl.arange(0, 1)
    m_ok = m < 1
    if PARTS == 1:
        if NORM:
            if GATHER:
                y *= _inverse_rms(x_ptr, width, eps, 1024)
            else:
                y *= 1.0 / tl.sqrt(tl.sum(tl.sum(square, axis=1), axis=0) / width + eps)
        _finish(
            y[None, :], m, m_ok, row, row_ok, tile, rows, out_ptr, bias_ptr, place_ptr, gate_ptr, best_ptr,
            best_row_ptr, out_stride, gate_stride, tiles, EPILOGUE, ACTIVATION, HAS_BIAS, SCATTER, BEST, 1, N,
        )  # fmt: skip
    else:
        tl.store(partial_ptr + part * rows + row, y, mask=row_ok)
        tl.debug_barrier()  # all of the part is out before it counts as arrived
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            total = tl.zeros((N,), tl.float32)
            for p in tl.static_range(PARTS):
                total += tl.load(partial_ptr + p * rows + row, mask=row_ok, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            if NORM:
                total *= _inverse_rms(x_ptr, width, eps, 1024)
            _finish(
                total[None, :], m, m_ok, row, row_ok, tile, rows, out_ptr, bias_ptr, place_ptr, gate_ptr, best_ptr,
                best_row_ptr, out_stride, gate_stride, tiles, EPILOGUE, ACTIVATION, HAS_BIAS, SCATTER, BEST, 1, N,
            )  # fmt: skip


@triton.jit
def few_rows(
    x_ptr, gain_ptr, index_ptr, data_ptr, scale_ptr, zero_ptr, map_ptr, out_ptr, bias_ptr, place_ptr, gate_ptr,
    best_ptr, best_row_ptr, partial_ptr, arrived_ptr,
    count, rows, columns, width, segments, groups, x_stride, data_stride, out_stride, gate_stride, steps_a_part,
    tiles, eps,
    BITS: tl.constexpr, SEGMENT: tl.constexpr, PER: tl.constexpr, SEGMENTS_A_GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr, HAS_ZERO: tl.constexpr, GATHER: tl.constexpr, NORM: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SCATTER: tl.constexpr,
    BEST: tl.constexpr, PDL: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """2 to M = 16 rows of x at once on the tensor cores; weights are expanded in registers to the dtype of x."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    E: tl.constexpr = SEGMENT // PER
    tile, part = tl.program_id(0), tl.program_id(1)
    row, row_ok = _output_rows(tile, rows, EPILOGUE, N)
    m = tl.arange(0, M)
    m_ok = m < count
    acc = tl.zeros((M, N), tl.float32)
    if NORM:
        square = tl.zeros((M, 128), tl.float32)
        for first in range(0, width, 128):
            w = first + tl.arange(0, 128)
            norm_ok = m_ok[:, None] & (w < width)[None, :]
            x = tl.load(x_ptr + m[:, None] * x_stride + w[None, :], mask=norm_ok, other=0.0).to(tl.float32)
            square += x * x
        inverse = 1.0 / tl.sqrt(tl.sum(square, axis=1) / width + eps)
    data_row = data_ptr + row.to(tl.int64) * data_stride
    steps = tl.cdiv(segments, G)
    for step in tl.range(part * steps_a_part, min((part + 1) * steps_a_part, steps), num_stages=STAGES):
        i = tl.arange(0, G * E)
        segment = step * G + i // E
        at = step * G * E + i
        ok = segment < segments
        if BITS == 16:
            ok = at < columns
        data = tl.load(
            data_row[:, None] + at[None, :], mask=row_ok[:, None] & ok[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if BITS < 16:
            group = _group_of(segment, map_ptr, ok, PER_CHANNEL, SEGMENTS_A_GROUP)
            scale_at = row[:, None] * groups + group[None, :]
            scale_ok = row_ok[:, None] & ok[None, :]
            scale = tl.load(scale_ptr + scale_at, mask=scale_ok, other=0.0).to(tl.float32)
            shift = tl.full((N, G * E), 1 << (BITS - 1), tl.float32)
            if HAS_ZERO:
                shift += tl.load(zero_ptr + scale_at, mask=scale_ok, other=0).to(tl.float32)
        for j in tl.static_range(PER):
            column = segment * SEGMENT + i % E + j * E
            if GATHER:
                place = tl.load(index_ptr + column, mask=ok, other=-1)
                x_ok = ok & (place >= 0)
            else:
                place = column
                x_ok = ok & (column < columns)
            x = tl.load(
                x_ptr + m[:, None] * x_stride + place[None, :], mask=m_ok[:, None] & x_ok[None, :], other=0.0
            )  # fmt: skip
            if NORM:
                gain = tl.load(gain_ptr + place, mask=x_ok, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) * inverse[:, None] * gain[None, :]).to(x_ptr.dtype.element_ty)
            w = data.to(x.dtype)
            if BITS < 16:
                w = ((_codes(data, j, BITS) - shift) * scale).to(x.dtype)
            acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    if PARTS == 1:
        _finish(
            acc, m, m_ok, row, row_ok, tile, rows, out_ptr, bias_ptr, place_ptr, gate_ptr, best_ptr, best_row_ptr,
            out_stride, gate_stride, tiles, EPILOGUE, ACTIVATION, HAS_BIAS, SCATTER, BEST, M, N,
        )  # fmt: skip
    else:
        ok = m_ok[:, None] & row_ok[None, :]
        partial = partial_ptr + m[:, None] * rows + row[None, :]
        tl.store(partial + part * count * rows, acc, mask=ok)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            total = tl.zeros((M, N), tl.float32)
            for p in tl.static_range(PARTS):
                total += tl.load(partial + p * count * rows, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _finish(
                total, m, m_ok, row, row_ok, tile, rows, out_ptr, bias_ptr, place_ptr, gate_ptr, best_ptr,
                best_row_ptr, out_stride, gate_stride, tiles, EPILOGUE, ACTIVATION, HAS_BIAS, SCATTER, BEST, M, N,
            )  # fmt: skip


@triton.jit
def expand(
    data_ptr, scale_ptr, zero_ptr, map_ptr, out_ptr, first_row, rows, segments, groups, data_stride, out_stride,
    BITS: tl.constexpr, SEGMENT: tl.constexpr, PER: tl.constexpr, SEGMENTS_A_GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr, HAS_ZERO: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Rows first_row .. rows of a packed weight as numbers [rows - first_row, segments * SEGMENT], in stored order."""
    E: tl.constexpr = SEGMENT // PER
    row = first_row + tl.program_id(0) * N + tl.arange(0, N)
    row_ok = row < rows
    i = tl.arange(0, G * E)
    segment = tl.program_id(1) * G + i // E
    ok = row_ok[:, None] & (segment < segments)[None, :]
    at = tl.program_id(1) * G * E + i
    data = tl.load(data_ptr + row.to(tl.int64)[:, None] * data_stride + at[None, :], mask=ok, other=0)
    group = _group_of(segment, map_ptr, segment < segments, PER_CHANNEL, SEGMENTS_A_GROUP)
    scale_at = row[:, None] * groups + group[None, :]
    scale = tl.load(scale_ptr + scale_at, mask=ok, other=0.0).to(tl.float32)
    shift = tl.full((N, G * E), 1 << (BITS - 1), tl.float32)
    if HAS_ZERO:
        shift += tl.load(zero_ptr + scale_at, mask=ok, other=0).to(tl.float32)
    to = out_ptr + (row - first_row).to(tl.int64)[:, None] * out_stride + (segment * SEGMENT + i % E)[None, :]
    for j in tl.static_range(PER):
        value = (_codes(data, j, BITS) - shift) * scale
        tl.store(to + j * E, value.to(out_ptr.dtype.element_ty), mask=ok)
