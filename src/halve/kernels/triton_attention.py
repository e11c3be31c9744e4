"""Triton kernels of a decode step besides its products: attention over the cache, and the choice of the next token.

Attention is split along the cache (flash-decoding, Dao et al. 2023): a program takes one key/value head, all query heads
that share it, and one stretch of the live slots; the last program to arrive puts the stretches together, in order. How
many slots are live is read from memory on the device, so that one captured launch serves every length, and programs
beyond the live slots end at once.

Shape legend: R query heads of one key/value head (padded to a power of two), D head size (padded), S cache slots of a
block, B batch, V vocabulary.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotated(x, partner, gain_ptr, cos, sin, d, other, d_ok, size, eps, NORM: tl.constexpr):
    """Rows x [R, D] normalised (NORM) and rotated; `partner` holds the element half a head away, of which `other` is
    the place."""
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + eps)
        gain = tl.load(gain_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
        partner_gain = tl.load(gain_ptr + other, mask=d_ok, other=0.0).to(tl.float32)
        x = x * inverse[:, None] * gain[None, :]
        partner = partner * inverse[:, None] * partner_gain[None, :]
    sign = tl.where(d < size // 2, -1.0, 1.0)
    return x * cos[None, :] + partner * (sign * sin)[None, :]


@triton.jit
def attend(
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, position_ptr, out_ptr, place_ptr,
    partial_ptr, stats_ptr, arrived_ptr,
    heads, kv_heads, size, capacity, window, qkv_stride, out_stride, eps, scale,
    QK_NORM: tl.constexpr, PLACED: tl.constexpr, HEADS_A_GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotary embedding, storing of the new key and value, and attention of one new token per row of the batch.

    qkv [B, (heads + 2 kv_heads) * size]; keys, values [B, kv_heads, capacity, size]; position int32 [B]: the slot of the
    new token, and with it the number of live slots, position + 1; a window > 0 sees only its last slots. PLACED: output i
    goes to out[place[i]], nowhere if that is -1. PLAIN: for Triton's interpreter, whose products of bfloat16 are wrong.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, group = pair // kv_heads, pair % kv_heads
    position = tl.load(position_ptr + batch)
    end = position + 1
    start = 0
    if window > 0:
        start = tl.maximum(end - window, 0)
    stretch = tl.cdiv(tl.cdiv(end - start, SPLITS), SHORTEST) * SHORTEST
    active = tl.cdiv(end - start, stretch)
    if split < active:
        r, d = tl.arange(0, R), tl.arange(0, D)
        half = size // 2
        other = tl.where(d < half, d + half, d - half)
        d_ok = d < size
        r_ok = r < HEADS_A_GROUP
        q_ok = r_ok[:, None] & d_ok[None, :]
        cos = tl.load(cos_ptr + position * size + d, mask=d_ok, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * size + d, mask=d_ok, other=0.0).to(tl.float32)
        q_row = qkv_ptr + batch * qkv_stride + (group * HEADS_A_GROUP + r[:, None]) * size
        q = tl.load(q_row + d[None, :], mask=q_ok, other=0.0).to(tl.float32)
        q_partner = tl.load(q_row + other[None, :], mask=q_ok, other=0.0).to(tl.float32)
        q = _rotated(q, q_partner, q_gain_ptr, cos, sin, d, other, d_ok, size, eps, QK_NORM)
        dtype: tl.constexpr = tl.float32 if PLAIN else keys_ptr.dtype.element_ty
        q = q.to(keys_ptr.dtype.element_ty).to(dtype)
        lines = (batch * kv_heads + group).to(tl.int64) * capacity * size
        if split == active - 1:
            # the stretch that holds the new slot stores it, and reads it back like the others
            one = tl.arange(0, 1)
            k_row = qkv_ptr + batch * qkv_stride + (heads + group) * size + one[:, None]
            k = tl.load(k_row + d[None, :], mask=d_ok[None, :], other=0.0).to(tl.float32)
            k_partner = tl.load(k_row + other[None, :], mask=d_ok[None, :], other=0.0).to(tl.float32)
            k = _rotated(k, k_partner, k_gain_ptr, cos, sin, d, other, d_ok, size, eps, QK_NORM)
            v = tl.load(k_row + kv_heads * size + d[None, :], mask=d_ok[None, :], other=0.0)
            to = lines + position * size + one[:, None] + d[None, :]
            tl.store(keys_ptr + to, k.to(keys_ptr.dtype.element_ty), mask=d_ok[None, :])
            tl.store(values_ptr + to, v.to(values_ptr.dtype.element_ty), mask=d_ok[None, :])
            tl.debug_barrier()
        first = start + split * stretch
        last = tl.minimum(first + stretch, end)
        top = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, D), tl.float32)
        for at in range(first, last, S):
            slot = at + tl.arange(0, S)
            live = slot < last
            read = lines + slot[:, None] * size + d[None, :]
            ok = live[:, None] & d_ok[None, :]
            k = tl.load(keys_ptr + read, mask=ok, other=0.0).to(dtype)
            v = tl.load(values_ptr + read, mask=ok, other=0.0).to(dtype)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(live[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            shrink = tl.exp(top - higher)
            weight = tl.exp(score - higher[:, None])
            acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(weight, axis=1)
            top = higher
        place = (group * HEADS_A_GROUP + r[:, None]) * size + d[None, :]
        if PLACED:
            place = tl.load(place_ptr + place, mask=q_ok, other=-1)
        out, out_ok = out_ptr + batch * out_stride + place, q_ok & (place >= 0)
        if active == 1:
            tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=out_ok)
        else:
            # partial [pair, split, R, D]: the weighted sums of values; stats [pair, split, 2, R]: largest score, sum of weights
            line, cell = r[:, None] * D + d[None, :], (pair * SPLITS + split) * R
            tl.store(partial_ptr + cell * D + line, acc)
            tl.store(stats_ptr + cell * 2 + r, top)
            tl.store(stats_ptr + cell * 2 + R + r, total)
            tl.debug_barrier()  # all of the stretch is out before it counts as arrived
            if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == active - 1:
                tl.store(arrived_ptr + pair, 0)
                top = tl.full((R,), float("-inf"), tl.float32)
                total = tl.zeros((R,), tl.float32)
                acc = tl.zeros((R, D), tl.float32)
                for s in range(0, active):
                    cell = (pair * SPLITS + s) * R
                    its_top = tl.load(stats_ptr + cell * 2 + r, cache_modifier=".cg")
                    its_acc = tl.load(partial_ptr + cell * D + line, cache_modifier=".cg")
                    its_total = tl.load(stats_ptr + cell * 2 + R + r, cache_modifier=".cg")
                    higher = tl.maximum(top, its_top)
                    shrink, grow = tl.exp(top - higher), tl.exp(its_top - higher)
                    acc = acc * shrink[:, None] + its_acc * grow[:, None]
                    total = total * shrink + its_total * grow
                    top = higher
                tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def choose(
    best_ptr, best_row_ptr, token_ptr, history_ptr, position_ptr, turn_ptr, tiles, history_stride, last_slot, last_row,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row of the largest logit among the tiles' best (the first of equal ones) becomes the next token, `last_row` where
    all are NaN; the position and the number of tokens made so far go on by one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    batch = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 2147483647, tl.int32)
    for first in range(0, tiles, BLOCK):
        at = first + lane
        ok = at < tiles
        seen = tl.load(best_ptr + batch * tiles + at, mask=ok, other=float("-inf"))
        where = tl.load(best_row_ptr + batch * tiles + at, mask=ok, other=2147483647)
        better = (seen > value) | ((seen == value) & (where < token))
        value, token = tl.where(better, seen, value), tl.where(better, where, token)
    top = tl.max(value, axis=0)
    chosen = tl.minimum(tl.min(tl.where(value == top, token, 2147483647), axis=0), last_row).to(tl.int64)
    turn, position = tl.load(turn_ptr + batch), tl.load(position_ptr + batch)
    tl.store(token_ptr + batch, chosen)
    tl.store(history_ptr + batch * history_stride + turn, chosen)
    tl.store(turn_ptr + batch, turn + 1)
    tl.store(position_ptr + batch, tl.minimum(position + 1, last_slot))
