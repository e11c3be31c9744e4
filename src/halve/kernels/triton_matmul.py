"""Triton kernels for products of up to 16 rows of x with a stored weight, for writing their inputs, and for expanding a weight.

Weights go through asynchronous copies to the tensor cores, packed ones expanded to the dtype of x in registers, two codes
an instruction; sums are float32. All that lies around a product is fused into its end, and whoever makes a vector writes
it as those who read it want it (`NormedInput`): kept inputs in the order in which the next weight stores its columns,
times the gain of the norm in between. The norm's other factor, 1 / root of the mean square, is one number a row: the
maker leaves the sums of squares of its tiles, the reader multiplies its sums at the end.

Rows of a weight are outputs. Columns come in segments of PER * E columns; element e of a segment holds PER codes, code c
is column c * E + e (chunk c). Packed rows lie in blocks of 16: [blocks, segments, 16, E], so that a tile is read in
pieces of a kilobyte; scales lie by groups: [groups, rows]. `triton_backend` lays weights out and launches these kernels.

Shape legend: M rows of x (16, `count` of them real), N output rows of a tile, E elements of a segment.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

STORE, ADD, GATE, TIMES = 0, 1, 2, 3  # epilogues: see `_finish`
# readers get x * gain / 8, so that it stays in the range of float16; a power of two changes no digit
_UNIT = tl.constexpr(8.0)


@triton.jit
def _output_rows(tile, rows, EPILOGUE: tl.constexpr, N: tl.constexpr):
    """Weight rows of a tile: in order, or for GATE pairs of a gate row and its up row, half a weight apart."""
    i = tl.arange(0, N)
    if EPILOGUE == 2:
        return (i % 2) * (rows // 2) + tile * (N // 2) + i // 2, tile * (N // 2) + i // 2 < rows // 2
    else:
        return tile * N + i, tile * N + i < rows


@triton.jit
def _numbers(data, c: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Chunk c of elements as numbers of a dtype, above the codes by BASE (see
    `triton_backend`)."""
    if BITS == 16 or BITS == 8:
        return data.to(dtype)
    elif PLAIN or dtype == tl.float32:
        return ((data >> (BITS * c)) & ((1 << BITS) - 1)).to(dtype)
    else:
        # two codes at once: the code becomes the low bits of the mantissa of 128 (bfloat16) or 1024 (float16)
        MASK: tl.constexpr = ((1 << BITS) - 1) * 65537
        MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        pair = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {BITS * c}; lop3.b32 $0, t, {MASK}, {MAGIC}, 0xea; }}",
            "=r,r", [data], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
        return pair.to(dtype, bitcast=True)


@triton.jit
def _prefetch(data_row, segment, BITS: tl.constexpr, E: tl.constexpr):
    """Ask for the rows' part of a segment to be brought into the second-level cache, by lines of 128 bytes."""
    BYTES: tl.constexpr = 1 if BITS == 8 else 2
    hop: tl.constexpr = E if BITS == 16 else 16 * E
    LINES: tl.constexpr = E * BYTES // 128 if E * BYTES > 128 else 1
    at = data_row[:, None] + segment * hop + tl.arange(0, LINES)[None, :] * (128 // BYTES)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _group(chunk, piece, map_ptr, groups, CHUNKS_A_GROUP: tl.constexpr, PIECES: tl.constexpr):
    """Which scale a chunk, or a piece of one, has."""
    if CHUNKS_A_GROUP > 0:
        return tl.minimum(chunk // CHUNKS_A_GROUP, groups - 1)
    else:
        return tl.load(map_ptr + chunk * PIECES + piece)


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
def _write_for_readers(
    y, m, ok, row, row_ok, width, gain_ptr, reader_ptr, reader_place_ptr, reader_stride,
    READERS: tl.constexpr, READERS_PLACED: tl.constexpr,
):  # fmt: skip
    """Values y [M, N] of x at `row`, as rounded, to its readers: READERS vectors side by side, each its own places."""
    gain = tl.load(gain_ptr + row, mask=row_ok, other=0.0).to(tl.float32)
    y = (y * gain[None, :] * (1.0 / _UNIT)).to(reader_ptr.dtype.element_ty)
    for reader in tl.static_range(READERS):
        place = row
        if READERS_PLACED:
            place = tl.load(reader_place_ptr + reader * width + row, mask=row_ok, other=-1)
        tl.store(reader_ptr + m[:, None] * reader_stride + place[None, :], y, mask=ok & (place >= 0)[None, :])


@triton.jit
def _finish(
    y, m, m_ok, row, row_ok, tile, rows, bias_ptr, out_ptr, place_ptr, gate_ptr, gain_ptr, reader_ptr, reader_place_ptr,
    squares_ptr, best_ptr, best_row_ptr, out_stride, gate_stride, reader_stride, tiles,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PLACED: tl.constexpr,
    BEST: tl.constexpr, READERS: tl.constexpr, READERS_PLACED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs y [M, N], float32, on their way to memory.

    STORE: out = y. ADD: out += y (the residual stream). GATE: out = activation(gate row) * up row. TIMES: out =
    activation(gate) * y with the gate computed before. PLACED: to out[place[row]], nowhere if that is -1. READERS: also to
    the next readers, and the tile's sum of squares. BEST: also the tile's largest value and its row.
    """
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 2:
        gate, up = tl.split(tl.reshape(y, (M, N // 2, 2)))
        y = _activation(gate, ACTIVATION) * up
        row = tile * (N // 2) + tl.arange(0, N // 2)
        row_ok = row < rows // 2
    place = row
    if PLACED:
        place = tl.load(place_ptr + row, mask=row_ok, other=-1)
    ok = m_ok[:, None] & (row_ok & (place >= 0))[None, :]
    if EPILOGUE == 3:
        gate = tl.load(gate_ptr + m[:, None] * gate_stride + place[None, :], mask=ok, other=0.0).to(tl.float32)
        y = _activation(gate, ACTIVATION) * y
    to = out_ptr + m[:, None] * out_stride + place[None, :]
    if EPILOGUE == 1:
        y += tl.load(to, mask=ok, other=0.0).to(tl.float32)
    rounded = y.to(out_ptr.dtype.element_ty)
    tl.store(to, rounded, mask=ok)
    seen = rounded.to(tl.float32)  # equal logits are then equal, and the first of them wins
    if READERS > 0:
        square = tl.where(row_ok[None, :], seen * seen, 0.0)
        tl.store(squares_ptr + m * tiles + tile, tl.sum(square, axis=1), mask=m_ok)
        _write_for_readers(
            seen, m, ok, row, row_ok, rows, gain_ptr, reader_ptr, reader_place_ptr, reader_stride, READERS,
            READERS_PLACED,
        )  # fmt: skip
    if BEST:
        seen = tl.where(row_ok[None, :], seen, float("-inf"))
        value = tl.max(seen, axis=1)
        first = tl.min(tl.where(seen == value[:, None], place[None, :], 2147483647), axis=1)
        tl.store(best_ptr + m * tiles + tile, value, mask=m_ok)
        tl.store(best_row_ptr + m * tiles + tile, first, mask=m_ok)


@triton.jit
def product(
    x_ptr, x_squares_ptr, data_ptr, scale_ptr, zero_ptr, map_ptr, bias_ptr, out_ptr, place_ptr, gate_ptr, gain_ptr,
    reader_ptr, reader_place_ptr, squares_ptr, best_ptr, best_row_ptr, partial_ptr, arrived_ptr,
    count, rows, columns, segments, groups, width, x_tiles, tiles, parts, segments_a_part,
    x_stride, data_stride, out_stride, gate_stride, reader_stride, eps,
    BITS: tl.constexpr, BASE: tl.constexpr, PER: tl.constexpr, E: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr,
    RUN: tl.constexpr, PIECES: tl.constexpr, HAS_ZERO: tl.constexpr, UNEVEN: tl.constexpr, NORM: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PLACED: tl.constexpr,
    BEST: tl.constexpr, READERS: tl.constexpr, READERS_PLACED: tl.constexpr, SPLIT: tl.constexpr, PLAIN: tl.constexpr,
    PDL: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, or one of `parts` parts of its columns; the part that arrives last adds them up, in order.

    x [count, stored columns]: in the weight's order, filled up with zeros. RUN chunks after each other have one scale
    (0: a whole row has one); a chunk of PIECES > 1 has one for every 8 columns. PLAIN: what Triton's interpreter can do,
    which is no assembly and products of float32.
    """
    dtype: tl.constexpr = tl.float32 if PLAIN else x_ptr.dtype.element_ty
    tile, part = tl.program_id(0), tl.program_id(1)
    row, row_ok = _output_rows(tile, rows, EPILOGUE, N)
    m, e = tl.arange(0, M), tl.arange(0, E)
    m_ok = m < count
    row_read = tl.minimum(row, rows - 1)  # beyond the last row it is read again, which costs less than a mask
    if BITS == 16:
        data_row = data_ptr + row_read.to(tl.int64) * data_stride
    else:
        data_row = data_ptr + (row_read // 16).to(tl.int64) * (segments * 16 * E) + (row_read % 16) * E
    first = part * segments_a_part
    if PDL:
        # the launch after this one may begin; what of this one depends on nothing is fetched before that before it ends
        tl.extra.cuda.gdc_launch_dependents()
        if not UNEVEN:
            for stage in tl.static_range(STAGES):
                _prefetch(data_row, tl.minimum(first + stage, segments - 1), BITS, E)
        tl.extra.cuda.gdc_wait()
    x_row = x_ptr + m[:, None] * x_stride
    if RUN == 0 and HAS_ZERO:
        shift = (tl.load(zero_ptr + row_read).to(tl.float32) + BASE).to(dtype)
    acc = tl.zeros((M, N), tl.float32)
    for segment in tl.range(first, tl.minimum(first + segments_a_part, segments), num_stages=STAGES):
        if BITS == 16:
            at = segment * E + e
            if UNEVEN:
                data = tl.load(data_row[:, None] + at[None, :], mask=(at < columns)[None, :], other=0.0)
            else:
                data = tl.load(data_row[:, None] + at[None, :])
        else:
            data = tl.load(data_row[:, None] + segment * (16 * E) + e[None, :])
        dot = acc if RUN == 0 else tl.zeros((M, N), tl.float32)
        for c in tl.static_range(PER):
            for piece in tl.static_range(PIECES):
                if RUN > 0 and c % RUN == 0:
                    group = _group(segment * PER + c, piece, map_ptr, groups, CHUNKS_A_GROUP, PIECES)
                    scale = tl.load(scale_ptr + group * rows + row_read).to(tl.float32)
                    if HAS_ZERO:
                        shift = (tl.load(zero_ptr + group * rows + row_read).to(tl.float32) + BASE).to(dtype)
                x_ok = m_ok[:, None]
                if PIECES > 1:
                    x_ok = x_ok & (e // (E // PIECES) == piece)[None, :]
                x = tl.load(x_row + (segment * (PER * E) + c * E + e)[None, :], mask=x_ok, other=0.0).to(dtype)
                weight = _numbers(data, c, dtype, BITS, PLAIN)
                if HAS_ZERO:
                    weight -= shift[:, None]
                elif BITS < 8:
                    weight -= BASE
                dot = tl.dot(x, tl.trans(weight), dot, input_precision="ieee")
                if RUN > 0 and c % RUN == RUN - 1:
                    acc += dot * scale[None, :]
                    dot = tl.zeros((M, N), tl.float32)
        if RUN == 0:
            acc = dot
    if SPLIT:
        ok = m_ok[:, None] & row_ok[None, :]
        partial = partial_ptr + m[:, None] * rows + row[None, :]
        tl.store(partial + part * count * rows, acc, mask=ok)
        tl.debug_barrier()  # all of the part is out before it counts as arrived
        done = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == parts - 1
        if done:
            acc = tl.zeros((M, N), tl.float32)
            for p in range(0, parts):
                acc += tl.load(partial + p * count * rows, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    else:
        done = True
    if done:
        if BITS < 16 and RUN == 0:
            acc *= tl.load(scale_ptr + row_read).to(tl.float32)[None, :]
        if NORM:
            total = tl.zeros((M, 64), tl.float32)
            for start in range(0, x_tiles, 64):
                at = start + tl.arange(0, 64)
                total += tl.load(
                    x_squares_ptr + m[:, None] * x_tiles + at[None, :], mask=m_ok[:, None] & (at < x_tiles)[None, :], other=0.0
                )  # fmt: skip
            inverse = 1.0 / tl.sqrt(tl.sum(total, axis=1) / width + eps)
            acc *= (inverse * _UNIT)[:, None]
        _finish(
            acc, m, m_ok, row, row_ok, tile, rows, bias_ptr, out_ptr, place_ptr, gate_ptr, gain_ptr, reader_ptr,
            reader_place_ptr, squares_ptr, best_ptr, best_row_ptr, out_stride, gate_stride, reader_stride, tiles, EPILOGUE,
            ACTIVATION, HAS_BIAS, PLACED, BEST, READERS, READERS_PLACED, M, N,
        )  # fmt: skip


@triton.jit
def write_for_readers(
    source_ptr, token_ptr, x_ptr, gain_ptr, reader_ptr, reader_place_ptr, squares_ptr, width, reader_stride,
    EMBED: tl.constexpr, READERS: tl.constexpr, READERS_PLACED: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the end of a product does for its readers, from a row that is there: of x, or of the embedding (EMBED), which
    then becomes x."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) + tl.arange(0, 1)
    source = source_ptr + m.to(tl.int64) * width
    if EMBED:
        source = source_ptr + tl.load(token_ptr + m) * width
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        row = start + tl.arange(0, BLOCK)
        row_ok = row < width
        y = tl.load(source[:, None] + row[None, :], mask=row_ok[None, :], other=0.0)
        if EMBED:
            tl.store(x_ptr + m[:, None] * width + row[None, :], y, mask=row_ok[None, :])
        y = y.to(tl.float32)
        total += tl.sum(y * y, axis=0)
        _write_for_readers(
            y, m, row_ok[None, :], row, row_ok, width, gain_ptr, reader_ptr, reader_place_ptr, reader_stride, READERS,
            READERS_PLACED,
        )  # fmt: skip
    tl.store(squares_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _expanded(
    data, row, row_ok, segment, e, c: tl.constexpr, scale_ptr, zero_ptr, map_ptr, rows, groups,
    BITS: tl.constexpr, BASE: tl.constexpr, PER: tl.constexpr, E: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr,
    RUN: tl.constexpr, PIECES: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """Chunk c of elements [N, E] of a packed weight's rows as float32 numbers."""
    group = e * 0
    if RUN > 0:
        group = _group(segment * PER + c + e * 0, e // (E // PIECES), map_ptr, groups, CHUNKS_A_GROUP, PIECES)
    at = group[None, :] * rows + row[:, None]
    shift = BASE
    if HAS_ZERO:
        shift += tl.load(zero_ptr + at, mask=row_ok, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + at, mask=row_ok, other=0.0).to(tl.float32)
    return (_numbers(data, c, tl.float32, BITS, True) - shift) * scale


@triton.jit
def expand(
    data_ptr, scale_ptr, zero_ptr, map_ptr, out_ptr, first_row, last_row, rows, segments, groups, out_stride,
    BITS: tl.constexpr, BASE: tl.constexpr, PER: tl.constexpr, E: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr,
    RUN: tl.constexpr, PIECES: tl.constexpr, HAS_ZERO: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows first_row ... last_row - 1 of a packed weight as numbers, in stored order, a segment of N rows a program."""
    row = first_row + tl.program_id(0) * N + tl.arange(0, N)
    row_ok = (row < last_row)[:, None]
    segment, e = tl.program_id(1), tl.arange(0, E)
    data_row = data_ptr + (row // 16).to(tl.int64) * (segments * 16 * E) + (row % 16) * E
    data = tl.load(data_row[:, None] + segment * (16 * E) + e[None, :], mask=row_ok, other=0)
    to = out_ptr + (row - first_row).to(tl.int64)[:, None] * out_stride + (segment * (PER * E) + e)[None, :]
    for c in tl.static_range(PER):
        value = _expanded(
            data, row, row_ok, segment, e, c, scale_ptr, zero_ptr, map_ptr, rows, groups, BITS, BASE, PER, E,
            CHUNKS_A_GROUP, RUN, PIECES, HAS_ZERO,
        )  # fmt: skip
        tl.store(to + c * E, value.to(out_ptr.dtype.element_ty), mask=row_ok)


@triton.jit
def look_up(
    row_ptr, data_ptr, scale_ptr, zero_ptr, map_ptr, order_ptr, out_ptr, rows, columns, segments, groups,
    BITS: tl.constexpr, BASE: tl.constexpr, PER: tl.constexpr, E: tl.constexpr, CHUNKS_A_GROUP: tl.constexpr,
    RUN: tl.constexpr, PIECES: tl.constexpr, HAS_ZERO: tl.constexpr, ORDERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows row_ptr[0], row_ptr[1], ... of a packed weight as numbers, columns in the weight's own order: a segment of one a
    program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) + tl.arange(0, 1)
    row = tl.load(row_ptr + m)
    row_ok = (row >= 0)[:, None]
    segment, e = tl.program_id(1), tl.arange(0, E)
    data_row = data_ptr + (row // 16) * (segments * 16 * E) + (row % 16) * E
    data = tl.load(data_row[:, None] + segment * (16 * E) + e[None, :], mask=row_ok, other=0)
    for c in tl.static_range(PER):
        value = _expanded(
            data, row, row_ok, segment, e, c, scale_ptr, zero_ptr, map_ptr, rows, groups, BITS, BASE, PER, E,
            CHUNKS_A_GROUP, RUN, PIECES, HAS_ZERO,
        )  # fmt: skip
        column = segment * (PER * E) + c * E + e
        if ORDERED:
            column = tl.load(order_ptr + column)
        ok = row_ok & ((column >= 0) & (column < columns))[None, :]
        to = out_ptr + m.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(to, value.to(out_ptr.dtype.element_ty), mask=ok)
