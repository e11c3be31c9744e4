/* The kernels, written once over a handful of vector operations and compiled once per instruction set (cpu.c).

   Before inclusion: FN(name) names the functions; TARGET marks them; LANES is the number of 32-bit lanes; PASS the rows of x whose
   sums fit into registers (2 or 8); BYTES is 1 where DOT multiplies bytes, 0 where it multiplies 16-bit integers;
   ROW_BY_ROW the longest row that is read by itself; VI and VF are the vectors of int32 and float32; the operations,
   FETCH_WORD and FETCH_SEGMENT among them, are those that cpu.c defines for every instruction set. */

#define VECS (ROWS / LANES)

/* Statements for every vector i of a block and every row m of x, written out: with constant indices from the start
   compilers keep the arrays in registers. */
#define EACH_VEC(...) \
    { \
        { enum { i = 0 }; __VA_ARGS__ } \
        if (VECS > 1) { enum { i = VECS > 1 }; __VA_ARGS__ } \
        if (VECS > 2) { enum { i = VECS > 2 ? 2 : 0 }; __VA_ARGS__ } \
        if (VECS > 2) { enum { i = VECS > 2 ? 3 : 0 }; __VA_ARGS__ } \
    }
#define EACH_OF_4(number, ...) \
    { \
        { enum { r = 0 }; __VA_ARGS__ } \
        if (number > 1) { enum { r = 1 }; __VA_ARGS__ } \
        if (number > 2) { enum { r = 2 }; __VA_ARGS__ } \
        if (number > 3) { enum { r = 3 }; __VA_ARGS__ } \
    }
#define EACH_OF_8(number, ...) \
    { \
        EACH_OF_4(number, __VA_ARGS__) \
        if (number > 4) { enum { r = 4 }; __VA_ARGS__ } \
        if (number > 5) { enum { r = 5 }; __VA_ARGS__ } \
        if (number > 6) { enum { r = 6 }; __VA_ARGS__ } \
        if (number > 7) { enum { r = 7 }; __VA_ARGS__ } \
    }
#define EACH_ROW_2(...) \
    { \
        { enum { m = 0 }; __VA_ARGS__ } \
        if (count > 1) { enum { m = 1 }; __VA_ARGS__ } \
    }
#define EACH_ROW(...) \
    { \
        { enum { m = 0 }; __VA_ARGS__ } \
        if (count > 1) { enum { m = 1 }; __VA_ARGS__ } \
        if (count > 2) { enum { m = 2 }; __VA_ARGS__ } \
        if (count > 3) { enum { m = 3 }; __VA_ARGS__ } \
        if (PASS > 4 && count > 4) { enum { m = PASS > 4 ? 4 : 0 }; __VA_ARGS__ } \
        if (PASS > 4 && count > 5) { enum { m = PASS > 4 ? 5 : 0 }; __VA_ARGS__ } \
        if (PASS > 4 && count > 6) { enum { m = PASS > 4 ? 6 : 0 }; __VA_ARGS__ } \
        if (PASS > 4 && count > 7) { enum { m = PASS > 4 ? 7 : 0 }; __VA_ARGS__ } \
    }

/* LANES scales of a group, as float32 */
INLINE TARGET VF FN(load_scale)(const weight_t *w, int64_t index) {
    if (w->scale_kind == BFLOAT16) return LOAD_BF16((const uint16_t *)w->scale + index);
    if (w->scale_kind == FLOAT16) return LOAD_F16((const uint16_t *)w->scale + index);
    return LOAD_F32((const float *)w->scale + index);
}

/* ---- packed weights ---- */

/* y [ROWS] += the products of what is no code in segment s of row m of x */
static NOINLINE TARGET void FN(add_outliers)(const weight_t *w, const rows_t *x, int64_t block, int64_t m, int64_t s,
                                             float *y) {
    const int32_t *codes = (const int32_t *)w->codes + block * w->words * ROWS;
    const int32_t *ends = x->outlier_end + m * w->segments;
    const outlier_t *outliers = x->outliers + m * w->columns, *outlier = outliers + (s ? ends[s - 1] : 0);
    const outlier_t *last = outliers + ends[s];
    const VI mask = SET1((1 << w->bits) - 1);
    VF sum[VECS];
    for (int i = 0; i < VECS; ++i) sum[i] = LOAD_F32(y + i * LANES);
    for (; outlier < last; ++outlier) {
        const int64_t group = (block * w->groups + outlier->group) * ROWS;
        for (int i = 0; i < VECS; ++i) {
            const VI code = AND(SHIFT_BY(LOAD(codes + outlier->word * (int64_t)ROWS + i * LANES), outlier->shift), mask);
            const VF zero = TO_FLOAT(w->zero ? LOAD_U8(w->zero + group + i * LANES) : SET1(w->offset));
            const VF number = MUL_F(SUB_F(TO_FLOAT(code), zero), FN(load_scale)(w, group + i * LANES));
            sum[i] = FMA(number, SET1_F(outlier->value), sum[i]);
        }
    }
    for (int i = 0; i < VECS; ++i) STORE_F32(y + i * LANES, sum[i]);
}

/* `listed`: x has outliers; vectors without any are spared the look after each segment */
INLINE TARGET void FN(packed_pass)(const weight_t *w, const rows_t *x, int64_t block, const int bits, int64_t first,
                                   const int count, float *y, const int listed) {
    const int levels = 8 / bits;
    /* one row of x: a shift is saved by summing the upper nibbles of bytes, 16 times too large, apart */
    const int apart = bits == 4 && count == 1;
    const uint32_t ones = BYTES ? 0x01010101u : 0x00010001u;
    const VI mask = SET1((int32_t)(((1u << bits) - 1) * ones)), mask_apart = SET1((int32_t)(0xf0u * ones));
    const int32_t *codes = (const int32_t *)w->codes + block * w->words * ROWS;
    const int64_t stride = w->columns / 2;
    const int32_t *plane = x->planes + first * stride;
    VF sum[PASS][4];
    EACH_ROW(EACH_VEC(sum[m][i] = ZERO_F();
                      if (listed) STORE_F32(y + (first + m) * ROWS + i * LANES, ZERO_F());))

    int64_t word = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t end = w->segment_end[s], group = (block * w->groups + w->segment_group[s]) * ROWS;
        const int32_t *sums = x->code_sum + first * w->segments + s;
        const int32_t *second_plane = plane + (end - word) * levels;
        VI total[PASS][2][4], total_apart[2][4];
        /* sum of (code - zero) * x = sum of code * x - zero * sum of x: integers, so exact (wrapping is undone) */
        EACH_VEC(EACH_ROW(total[m][BYTES][i] = SET1(0);
                          total[m][0][i] = w->zero
                              ? MUL(LOAD_U8(w->zero + group + i * LANES), SET1(-sums[m * w->segments]))
                              : SET1(w->offset * -sums[m * w->segments]);)
                 total_apart[0][i] = total_apart[1][i] = SET1(0);)
        FETCH_SEGMENT(codes + word * ROWS);
        for (; word < end; ++word, plane += levels, second_plane += levels) {
            VI packed[4], upper[4];
            EACH_VEC(packed[i] = LOAD(codes + word * ROWS + i * LANES);
                     upper[i] = BYTES ? packed[i] : SHIFT16(packed[i], 8);)
            FETCH_WORD(codes + word * ROWS);
#pragma GCC unroll 4
            for (int n = 0; n < levels; ++n) {
                VI code[2][4];
                if (apart && n) {
                    EACH_VEC(code[0][i] = AND(packed[i], mask_apart); code[1][i] = AND(upper[i], mask_apart);
                             total_apart[0][i] = DOT(total_apart[0][i], code[0][i], SET1(plane[n]));
                             total_apart[BYTES][i] = DOT(total_apart[BYTES][i], code[1][i], SET1(second_plane[n]));)
                    continue;
                }
                EACH_VEC(code[0][i] = n ? SHIFT16(packed[i], n * bits) : packed[i];
                         code[1][i] = n ? SHIFT16(upper[i], n * bits) : upper[i];
                         if (!BYTES || bits < 8) code[0][i] = AND(code[0][i], mask);
                         if (bits < 8) code[1][i] = AND(code[1][i], mask);)
                EACH_ROW(const VI unit = SET1(plane[m * stride + n]), second_unit = SET1(second_plane[m * stride + n]);
                         EACH_VEC(total[m][0][i] = DOT(total[m][0][i], code[0][i], unit);
                                  IN_REGISTER(total[m][0][i]);
                                  total[m][BYTES][i] = DOT(total[m][BYTES][i], code[1][i], second_unit);
                                  IN_REGISTER(total[m][BYTES][i]);))
            }
        }
        plane = second_plane; /* where the next segment begins */
        EACH_ROW(EACH_VEC(if (BYTES) total[m][0][i] = ADD(total[m][0][i], SHIFT_LEFT(total[m][1][i], 8));))
        if (apart)
            EACH_VEC(if (BYTES) total_apart[0][i] = ADD(total_apart[0][i], SHIFT_LEFT(total_apart[1][i], 8));
                     total[0][0][i] = ADD(total[0][0][i], SHIFT_SIGNED32(total_apart[0][i], 4));)
        EACH_VEC(const VF scale = FN(load_scale)(w, group + i * LANES);
                 EACH_ROW(const VF factor = MUL_F(scale, SET1_F(x->scale[(first + m) * w->segments + s]));
                          sum[m][i] = FMA(TO_FLOAT(total[m][0][i]), factor, sum[m][i]);))
        if (listed)
            EACH_ROW(const int32_t *ends = x->outlier_end + (first + m) * w->segments + s;
                     if (*ends > (s ? ends[-1] : 0))
                         FN(add_outliers)(w, x, block, first + m, s, y + (first + m) * ROWS);)
    }
    EACH_ROW(EACH_VEC(float *place = y + (first + m) * ROWS + i * LANES;
                      STORE_F32(place, listed ? ADD_F(LOAD_F32(place), sum[m][i]) : sum[m][i]);))
}

INLINE TARGET void FN(plain_pass)(const weight_t *w, const rows_t *x, int64_t block, const int bits, int64_t first,
                                  const int count, float *y) {
    FN(packed_pass)(w, x, block, bits, first, count, y, 0);
}

INLINE TARGET void FN(listed_pass)(const weight_t *w, const rows_t *x, int64_t block, const int bits, int64_t first,
                                   const int count, float *y) {
    FN(packed_pass)(w, x, block, bits, first, count, y, 1);
}

/* codes as numbers against x as it is */
INLINE TARGET void FN(exact_pass)(const weight_t *w, const rows_t *x, int64_t block, const int bits, int64_t first,
                                  const int count, float *y) {
    const int32_t *codes = (const int32_t *)w->codes + block * w->words * ROWS;
    const int64_t columns = w->columns;
    const float *xs = x->values + first * columns;
    const VI mask = SET1((1 << bits) - 1);
    VF sum[PASS][4];
    EACH_ROW(EACH_VEC(sum[m][i] = ZERO_F();))

    int64_t word = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t group = (block * w->groups + w->segment_group[s]) * ROWS;
        VF total[PASS][4], second_total[4], zero[4]; /* one row of x: two sums hide the latency */
        EACH_VEC(EACH_ROW(total[m][i] = ZERO_F();)
                 second_total[i] = ZERO_F();
                 /* a code in the low bits of 2^23 is a number without a conversion */
                 zero[i] = TO_FLOAT(ADD(w->zero ? LOAD_U8(w->zero + group + i * LANES) : SET1(w->offset), SET1(1 << 23)));)
        FETCH_SEGMENT(codes + word * ROWS);
        for (const int64_t end = w->segment_end[s]; word < end; ++word, xs += 32 / bits) {
            VI packed[4];
            EACH_VEC(packed[i] = LOAD(codes + word * ROWS + i * LANES);)
            FETCH_WORD(codes + word * ROWS);
#pragma GCC unroll 16
            for (int c = 0; c < 32 / bits; ++c)
                EACH_VEC(const VI shifted = SHIFT32(packed[i], c % 4 * 8 + c / 4 * bits);
                         const VF code = SUB_F(AS_FLOAT(OR(AND(shifted, mask), SET1(0x4b000000))), zero[i]);
                         if (count == 1 && c % 2) second_total[i] = FMA(code, SET1_F(xs[c]), second_total[i]);
                         else EACH_ROW(total[m][i] = FMA(code, SET1_F(xs[m * columns + c]), total[m][i]);))
        }
        EACH_VEC(const VF scale = FN(load_scale)(w, group + i * LANES);
                 if (count == 1) total[0][i] = ADD_F(total[0][i], second_total[i]);
                 EACH_ROW(sum[m][i] = FMA(total[m][i], scale, sum[m][i]);))
    }
    EACH_ROW(EACH_VEC(STORE_F32(y + (first + m) * ROWS + i * LANES, sum[m][i]);))
}

#define PASS_CASE(pass, bits, n) \
    case n: \
        if (n <= PASS) FN(pass)(w, x, block, bits, first, n, y); \
        break;
#define EACH_COUNT(pass, bits) \
    switch (count) { \
        PASS_CASE(pass, bits, 1) PASS_CASE(pass, bits, 2) PASS_CASE(pass, bits, 3) PASS_CASE(pass, bits, 4) \
        PASS_CASE(pass, bits, 5) PASS_CASE(pass, bits, 6) PASS_CASE(pass, bits, 7) PASS_CASE(pass, bits, 8) \
    }

/* ---- dense weights ---- */

/* sum += the products of one vector of a row and x; bfloat16 has two numbers a lane, x its even ones apart */
INLINE TARGET void FN(dense_step)(const void *codes, const float *xs, int64_t c, const int kind, VF *sum) {
    if (kind == BFLOAT16) {
        /* either half of a lane, with zeros below, is a float32 */
        const VI two = LOAD((const uint16_t *)codes + c);
        sum[0] = FMA(AS_FLOAT(SHIFT_LEFT(two, 16)), LOAD_F32(xs + c), sum[0]);
        sum[1] = FMA(AS_FLOAT(AND(two, SET1((int32_t)0xffff0000))), LOAD_F32(xs + c + LANES), sum[1]);
    } else sum[0] = FMA(LOAD_F32((const float *)codes + c), LOAD_F32(xs + c), sum[0]);
}

/* `rows` rows of the weight against `count` rows of x; both constants, so that all sums stay in registers.
   Fetched into the second-level cache meanwhile, since processors stop doing so at page ends: of four rows or fewer what is
   below them, of eight what comes next. */
INLINE TARGET void FN(dense_tile)(const weight_t *w, const rows_t *x, int64_t row, const int rows, int64_t first,
                                  const int count, float *y, const int kind) {
    const int64_t columns = w->columns, step = kind == BFLOAT16 ? 2 * LANES : LANES;
    const int64_t whole = columns / step * step;
    const int odd_sum = count == 1; /* one row of x: two sums a row hide the latency; two rows do so themselves */
    const int64_t ahead = rows > 4 ? 16 * step : 4 * columns;
    const float *xs = x->values + first * columns;
    VF sum[8][2][2];
    EACH_OF_8(rows, EACH_ROW_2(sum[r][m][0] = ZERO_F(); sum[r][m][1] = ZERO_F();))
    for (int64_t c = 0; c < whole; c += step) {
        VF low[2], high[2];
        EACH_ROW_2(low[m] = LOAD_F32(xs + m * columns + c);
                   if (kind == BFLOAT16) high[m] = LOAD_F32(xs + m * columns + c + LANES);)
        EACH_OF_8(rows,
            if (kind == BFLOAT16) {
                /* two bfloat16 a lane: either half, with zeros below, is a float32 */
                const VI two = LOAD((const uint16_t *)w->codes + (row + r) * columns + c);
                __builtin_prefetch((const uint16_t *)w->codes + (row + r) * columns + c + ahead, 0, 2);
                const VF even = AS_FLOAT(SHIFT_LEFT(two, 16)), odd = AS_FLOAT(AND(two, SET1((int32_t)0xffff0000)));
                EACH_ROW_2(sum[r][m][0] = FMA(even, low[m], sum[r][m][0]);
                           sum[r][m][odd_sum] = FMA(odd, high[m], sum[r][m][odd_sum]);)
            } else {
                const VF weights = LOAD_F32((const float *)w->codes + (row + r) * columns + c);
                __builtin_prefetch((const float *)w->codes + (row + r) * columns + c + ahead, 0, 2);
                EACH_ROW_2(sum[r][m][0] = FMA(weights, low[m], sum[r][m][0]);)
            })
    }
    EACH_OF_8(rows, EACH_ROW_2(
        float lanes[LANES], total = 0;
        STORE_F32(lanes, ADD_F(sum[r][m][0], sum[r][m][1]));
        for (int i = 0; i < LANES; ++i) total += lanes[i];
        for (int64_t c = whole; c < columns; ++c) {
            const int64_t at = (row + r) * columns + c;
            total += number_at(w->codes, kind, at) * xs[m * columns + c];
        }
        y[(first + m) * ROWS + row % ROWS + r] = total;))
}

/* One row of x against the rows of a block one by one: memory is read from front to back. */
INLINE TARGET void FN(dense_rows)(const weight_t *w, const float *xs, int64_t row, int64_t last, float *y,
                                  const int kind) {
    const int64_t columns = w->columns, step = kind == BFLOAT16 ? 2 * LANES : LANES, whole = columns / step * step;
    for (; row < last; ++row, ++y) {
        const char *codes = (const char *)w->codes + row * columns * (kind == BFLOAT16 ? 2 : 4);
        VF sum[4][2];
        EACH_OF_4(4, sum[r][0] = ZERO_F(); sum[r][1] = ZERO_F();)
        int64_t c = 0;
        for (; c + 4 * step <= whole; c += 4 * step)
            EACH_OF_4(4, FN(dense_step)(codes, xs, c + r * step, kind, sum[r]);)
        for (; c < whole; c += step) FN(dense_step)(codes, xs, c, kind, sum[0]);
        float total[4];
        EACH_OF_4(4, sum[r][0] = ADD_F(sum[r][0], sum[r][1]);)
        STORE_SUMS(total, sum[0][0], sum[1][0], sum[2][0], sum[3][0]);
        *y = (total[0] + total[1]) + (total[2] + total[3]);
        for (; c < columns; ++c) *y += number_at(codes, kind, c) * xs[c];
    }
}

INLINE TARGET void FN(dense_block)(const weight_t *w, const rows_t *x, int64_t block, float *y, const int kind) {
    const int64_t last = (block + 1) * ROWS < w->rows ? (block + 1) * ROWS : w->rows;
    if (w->columns <= ROW_BY_ROW && x->count == 1) {
        FN(dense_rows)(w, x->values, block * ROWS, last, y, kind);
        return;
    }
    for (int64_t row = block * ROWS; row < last;) {
        /* x of longer rows does not stay in the first-level cache: many rows share what is read of it */
        const int eight = ROW_BY_ROW && x->count == 1 && row + 8 <= last, four = row + 4 <= last;
        for (int64_t first = 0; first < x->count; first += 2) {
            const int two = first + 2 <= x->count;
            if (eight) FN(dense_tile)(w, x, row, 8, first, 1, y, kind);
            else if (four && two) FN(dense_tile)(w, x, row, 4, first, 2, y, kind);
            else if (four) FN(dense_tile)(w, x, row, 4, first, 1, y, kind);
            else if (two) FN(dense_tile)(w, x, row, 1, first, 2, y, kind);
            else FN(dense_tile)(w, x, row, 1, first, 1, y, kind);
        }
        row += eight ? 8 : four ? 4 : 1;
    }
}

/* ---- what cpu.c calls ---- */

/* the rows of x a few at a time, in passes of even size: the second reads the block from the cache */
#define EACH_PASS(pass) \
    for (int64_t n = 0, passes = (x->count + PASS - 1) / PASS; n < passes; ++n) { \
        const int64_t first = x->count * n / passes; \
        const int count = (int)(x->count * (n + 1) / passes - first); \
        if (w->bits == 4) EACH_COUNT(pass, 4) \
        else if (w->bits == 8) EACH_COUNT(pass, 8) \
        else EACH_COUNT(pass, 2) \
    }

/* by themselves: together with the other loops compilers move more registers about in theirs */
static NOINLINE TARGET void FN(multiply_exact)(const weight_t *w, const rows_t *x, int64_t block, float *y) {
    EACH_PASS(exact_pass)
}

static NOINLINE TARGET void FN(multiply_plain)(const weight_t *w, const rows_t *x, int64_t block, float *y) {
    EACH_PASS(plain_pass)
}

static NOINLINE TARGET void FN(multiply_listed)(const weight_t *w, const rows_t *x, int64_t block, float *y) {
    EACH_PASS(listed_pass)
}

static TARGET void FN(multiply)(const weight_t *w, const rows_t *x, int64_t block, float *y) {
    if (!w->scale) {
        if (w->dense_kind == BFLOAT16) FN(dense_block)(w, x, block, y, BFLOAT16);
        else FN(dense_block)(w, x, block, y, FLOAT32);
        return;
    }
    if (w->exact) {
        FN(multiply_exact)(w, x, block, y);
        return;
    }
    for (int64_t m = 1; m <= x->count; ++m)
        if (x->outlier_end[m * w->segments - 1]) {
            FN(multiply_listed)(w, x, block, y);
            return;
        }
    FN(multiply_plain)(w, x, block, y);
}

/* x in the order of a dense weight's columns: for bfloat16 weights even columns apart, as the kernel reads them */
INLINE TARGET void FN(prepare_dense)(const weight_t *w, const void *x, int kind, float *values) {
    if (kind == BFLOAT16)
        for (int64_t c = 0; c < w->columns; ++c) values[c] = from_bf16(((const uint16_t *)x)[c]);
    else memcpy(values, x, (size_t)w->columns * sizeof(float));
    if (w->dense_kind != BFLOAT16) return;
    float block[2 * LANES];
    for (int64_t c = 0; c + 2 * LANES <= w->columns; c += 2 * LANES) {
        for (int i = 0; i < 2 * LANES; ++i) block[i] = values[c + i];
        for (int i = 0; i < LANES; ++i) values[c + i] = block[2 * i], values[c + LANES + i] = block[2 * i + 1];
    }
}

/* The magnitude, as bits, up to which numbers of a segment become codes: more than half of those that are not 0 reach a
   32nd of it, so that it is 32 times their median at most. An infinity or NaN is above, and 0 stands for none. */
INLINE TARGET int32_t FN(code_limit)(const float *part, int64_t size, int32_t largest) {
    enum { OCTAVE = 1 << 23, FINITE = 0x7f7fffff, SMALLEST = 27 << 23 }; /* 2^-100: scales far below would lose bits */
    for (int32_t limit = largest < FINITE ? largest : FINITE; limit >= SMALLEST; limit -= OCTAVE) {
        int32_t numbers = 0, reaching = 0;
        for (int64_t c = 0; c < size; ++c) {
            numbers += magnitude_bits(part[c]) > 0;
            reaching += magnitude_bits(part[c]) >= limit - 5 * OCTAVE;
        }
        if (2 * reaching > numbers) return limit;
    }
    return 0;
}

/* x as integers under one scale a segment, and what lies too far above the others of its segment in a list */
INLINE TARGET void FN(prepare_codes)(const weight_t *w, const float *source, const rows_t *rows, int64_t m) {
    outlier_t *outlier = rows->outliers + m * w->columns;
    const int64_t per_word = 32 / w->bits;
    int64_t first = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t size = w->segment_end[s] * per_word - first;
        float gathered[MAX_SEGMENT];
        const float *part = source + first;
        if (w->order) {
            for (int64_t c = 0; c < size; ++c) {
                const int32_t at = w->order[first + c];
                gathered[c] = at >= 0 ? source[at] : 0.0f;
            }
            part = gathered;
        }
        int32_t largest = 0;
        for (int64_t c = 0; c < size; ++c) {
            const int32_t magnitude = magnitude_bits(part[c]);
            largest = magnitude > largest ? magnitude : largest;
        }
        const int32_t limit = FN(code_limit)(part, size, largest);
        if (largest > limit) {
            largest = 0;
            for (int64_t c = 0; c < size; ++c) {
                const float value = part[c]; /* which may be gathered[c] */
                const int32_t magnitude = magnitude_bits(value);
                gathered[c] = magnitude > limit ? 0.0f : value;
                if (magnitude > limit)
                    *outlier++ = (outlier_t){(int32_t)((first + c) / per_word),
                                             (int32_t)(c % per_word % 4 * 8 + c % per_word / 4 * w->bits),
                                             w->segment_group[s], value};
                else largest = magnitude > largest ? magnitude : largest;
            }
            part = gathered;
        }
        const float peak = bits_float(largest), inverse = largest ? (float)LARGEST_CODE / peak : 0.0f;
        int32_t codes[MAX_SEGMENT], sum = 0;
        for (int64_t c = 0; c < size; ++c) {
            /* adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa */
            codes[c] = float_bits(part[c] * inverse + 12582912.0f) - 0x4b400000;
            sum += codes[c];
        }
        int32_t *planes = rows->planes + (m * w->columns + first) / 2;
        if (BYTES) {
            int8_t *low = (int8_t *)planes, *high = low + size;
            for (int64_t c = 0; c < size; ++c) low[c] = (int8_t)codes[c], high[c] = (int8_t)((codes[c] + 128) >> 8);
        } else {
            int16_t *even = (int16_t *)planes, *odd = even + size / 2;
            for (int64_t c = 0; c < size / 2; ++c) even[c] = (int16_t)codes[2 * c], odd[c] = (int16_t)codes[2 * c + 1];
        }
        rows->scale[m * w->segments + s] = peak / (float)LARGEST_CODE;
        rows->code_sum[m * w->segments + s] = sum;
        rows->outlier_end[m * w->segments + s] = (int32_t)(outlier - (rows->outliers + m * w->columns));
        first += size;
    }
}

static TARGET void FN(prepare)(const weight_t *w, const void *x, int kind, const rows_t *rows, int64_t m) {
    float *values = rows->values + m * w->columns;
    if (!w->scale) FN(prepare_dense)(w, x, kind, values);
    else if (w->exact)
        for (int64_t c = 0; c < w->columns; ++c) {
            const int64_t at = w->order ? w->order[c] : c;
            values[c] = at >= 0 ? number_at(x, kind, at) : 0.0f;
        }
    else if (kind == BFLOAT16) {
        for (int64_t c = 0; c < w->in_features; ++c) values[c] = from_bf16(((const uint16_t *)x)[c]);
        FN(prepare_codes)(w, values, rows, m);
    } else FN(prepare_codes)(w, x, rows, m);
}

INLINE TARGET void FN(expand_block)(const weight_t *w, int64_t block, const int bits, int kind, void *out,
                                    int64_t stride) {
    const int32_t *codes = (const int32_t *)w->codes + block * w->words * ROWS;
    const VI mask = SET1((1 << bits) - 1);
    int64_t word = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t group = (block * w->groups + w->segment_group[s]) * ROWS;
        VF scale[VECS], zero[VECS];
        for (int i = 0; i < VECS; ++i) {
            scale[i] = FN(load_scale)(w, group + i * LANES);
            zero[i] = TO_FLOAT(w->zero ? LOAD_U8(w->zero + group + i * LANES) : SET1(w->offset));
        }
        for (const int64_t end = w->segment_end[s]; word < end; ++word) {
            VI packed[VECS];
            for (int i = 0; i < VECS; ++i) packed[i] = LOAD(codes + word * ROWS + i * LANES);
#pragma GCC unroll 16
            for (int c = 0; c < 32 / bits; ++c) {
                const int64_t column = word * (32 / bits) + c, at = w->order ? w->order[column] : column;
                if (at < 0) continue;
                float numbers[ROWS];
                float *target = kind == FLOAT32 ? (float *)out + at * stride : numbers;
                for (int i = 0; i < VECS; ++i) {
                    const VI code = AND(SHIFT32(packed[i], c % 4 * 8 + c / 4 * bits), mask);
                    STORE_F32(target + i * LANES, MUL_F(SUB_F(TO_FLOAT(code), zero[i]), scale[i]));
                }
                if (kind == BFLOAT16)
                    for (int i = 0; i < ROWS; ++i) ((uint16_t *)out)[at * stride + i] = to_bf16(numbers[i]);
            }
        }
    }
}

static TARGET void FN(expand)(const weight_t *w, int64_t block, int kind, void *out, int64_t stride) {
    if (w->bits == 4) FN(expand_block)(w, block, 4, kind, out, stride);
    else if (w->bits == 8) FN(expand_block)(w, block, 8, kind, out, stride);
    else FN(expand_block)(w, block, 2, kind, out, stride);
}

#undef VECS
#undef EACH_PASS
#undef EACH_COUNT
#undef PASS_CASE
#undef EACH_VEC
#undef EACH_ROW
#undef EACH_ROW_2
