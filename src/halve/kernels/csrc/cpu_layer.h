/* What one decode step needs between the matrix products, in float32: norms, activations, attention of one query.

   Included after cpu_body.h, with the same definitions and STORE_SUMS, the sums over the
   lanes of four vectors. Plain loops are
   written so that compilers turn them into vectors. */


/* e^x, error 2e-7 relative: 2^n times the Taylor series on [-ln 2 / 2, ln 2 / 2] up to x^7 */
INLINE TARGET float FN(exponential)(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    /* adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa */
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first with few bits */
    const float series =
        1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 +
        r * (1.0f / 720 + r * (1.0f / 5040)))))));
    const uint32_t power = (uint32_t)float_bits(shifted) - 0x4b400000u; /* n */
    return series * bits_float((int32_t)((power + 127u) << 23));
}

/* Sixteen sums side by side: compilers may not reorder one sum into a vector, these they may. */
#define SUMS 16
INLINE TARGET float FN(total)(const float *sums) {
    float total = 0;
    for (int i = 0; i < SUMS; ++i) total += sums[i];
    return total;
}

/* RMSNorm or LayerNorm of one row of n numbers; weight and bias in `kind`, or NULL */
static TARGET void FN(norm)(const float *x, int64_t n, const void *weight, const void *bias, int kind, int rms,
                            float eps, float *out) {
    const int64_t whole = n / SUMS * SUMS;
    float sums[SUMS] = {0}, mean = 0;
    if (!rms) {
        for (int64_t c = 0; c < whole; c += SUMS)
            for (int i = 0; i < SUMS; ++i) sums[i] += x[c + i];
        mean = FN(total)(sums);
        for (int64_t c = whole; c < n; ++c) mean += x[c];
        mean /= (float)n;
        for (int i = 0; i < SUMS; ++i) sums[i] = 0;
    }
    for (int64_t c = 0; c < whole; c += SUMS)
        for (int i = 0; i < SUMS; ++i) sums[i] += (x[c + i] - mean) * (x[c + i] - mean);
    float squares = FN(total)(sums);
    for (int64_t c = whole; c < n; ++c) squares += (x[c] - mean) * (x[c] - mean);
    const float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (int64_t c = 0; c < n; ++c) out[c] = (x[c] - mean) * scale;
    if (weight && kind == BFLOAT16)
        for (int64_t c = 0; c < n; ++c) out[c] *= from_bf16(((const uint16_t *)weight)[c]);
    else if (weight)
        for (int64_t c = 0; c < n; ++c) out[c] *= ((const float *)weight)[c];
    if (bias && kind == BFLOAT16)
        for (int64_t c = 0; c < n; ++c) out[c] += from_bf16(((const uint16_t *)bias)[c]);
    else if (bias)
        for (int64_t c = 0; c < n; ++c) out[c] += ((const float *)bias)[c];
}

/* out = activation(gate) * up, or activation(gate) where up is NULL; out may be gate */
static TARGET void FN(activate)(const float *gate, const float *up, int64_t n, int activation, float *out) {
    if (activation == SILU)
        for (int64_t c = 0; c < n; ++c) out[c] = gate[c] / (1.0f + FN(exponential)(-gate[c]));
    else if (activation == RELU)
        for (int64_t c = 0; c < n; ++c) out[c] = gate[c] < 0 ? 0 : gate[c];
    else if (activation == RELU_SQUARED)
        for (int64_t c = 0; c < n; ++c) out[c] = gate[c] < 0 ? 0 : gate[c] * gate[c];
    else if (activation == GELU_TANH) /* (1 + tanh z) / 2 = 1 / (1 + e^(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3) */
        for (int64_t c = 0; c < n; ++c) {
            const float x = gate[c], z2 = 1.59576912f * (x + 0.044715f * x * x * x);
            out[c] = x / (1.0f + FN(exponential)(-z2));
        }
    else
        for (int64_t c = 0; c < n; ++c) out[c] = 0.5f * gate[c] * (1.0f + erff(gate[c] * 0.707106781f));
    if (up)
        for (int64_t c = 0; c < n; ++c) out[c] *= up[c];
}

/* x = cap tanh(x / cap), in place: tanh z = 1 - 2 / (1 + e^(2 z)) */
static TARGET void FN(cap)(float *x, int64_t n, float cap) {
    const float twice = 2.0f / cap;
    for (int64_t c = 0; c < n; ++c) x[c] = cap - 2.0f * cap / (1.0f + FN(exponential)(x[c] * twice));
}

/* q of `size` numbers, turned in place: cos and sin of its position, half-split form */
static TARGET void FN(rotate)(float *q, const float *cosine, const float *sine, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t c = 0; c < half; ++c) {
        const float low = q[c], high = q[c + half];
        q[c] = low * cosine[c] - high * sine[c];
        q[c + half] = high * cosine[c + half] + low * sine[c + half];
    }
}

INLINE TARGET VF FN(load_cached)(const void *p, int kind, int64_t at) {
    return kind == BFLOAT16 ? LOAD_BF16((const uint16_t *)p + at) : LOAD_F32((const float *)p + at);
}

/* heads that share keys, at a time; and cache slots: a multiple of every such number of heads, so that scores can be
   looked through in sections of that length, each place of which belongs to one head */
enum { PASTE(QUERIES, ISA) = 4, PASTE(SECTION, ISA) = 48 };
#define MAX_QUERIES PASTE(QUERIES, ISA)
#define SECTION PASTE(SECTION, ISA)

/* score[s * count + g]: query g (scaled) against key s. The values, which come next, are fetched meanwhile. */
INLINE TARGET void FN(scores)(const float *q, const int count, const void *keys, const void *values, const int kind,
                              int64_t first, int64_t slots, int64_t size, float *score) {
    const int64_t whole = size / LANES * LANES, row_bytes = size * (kind == BFLOAT16 ? 2 : 4);
    for (int64_t s = 0; s < slots; ++s) {
        const int64_t at = (first + s) * size;
        for (int64_t b = 0; b < row_bytes; b += 64)
            __builtin_prefetch((const char *)values + (first + s) * row_bytes + b, 0, 3);
        VF sum[MAX_QUERIES];
        EACH_OF_4(MAX_QUERIES, sum[r] = ZERO_F();)
        for (int64_t c = 0; c < whole; c += LANES) {
            const VF key = FN(load_cached)(keys, kind, at + c);
            EACH_OF_4(count, sum[r] = FMA(key, LOAD_F32(q + r * size + c), sum[r]);)
        }
        float total[MAX_QUERIES];
        STORE_SUMS(total, sum[0], sum[1], sum[2], sum[3]);
        for (int g = 0; whole < size && g < count; ++g)
            total[g] += rest_of_score(q + g * size, keys, kind, at, whole, size);
        memcpy(score + s * count, total, (size_t)count * sizeof(float));
    }
}

/* out[g] += score[g] times the values */
INLINE TARGET void FN(mix)(const float *score, const int count, const void *values, const int kind, int64_t first,
                           int64_t slots, int64_t size, float *out) {
    const int64_t whole = size / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) {
        VF sum[MAX_QUERIES];
        for (int g = 0; g < count; ++g) sum[g] = LOAD_F32(out + g * size + c);
        for (int64_t s = 0; s < slots; ++s) {
            const VF value = FN(load_cached)(values, kind, (first + s) * size + c);
            for (int g = 0; g < count; ++g) sum[g] = FMA(value, SET1_F(score[s * count + g]), sum[g]);
        }
        for (int g = 0; g < count; ++g) STORE_F32(out + g * size + c, sum[g]);
    }
    if (whole < size) rest_of_mix(score, count, values, kind, first, slots, whole, size, out);
}

/* Softmax over the slots in pieces, with a running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867). */
INLINE TARGET void FN(attend_few)(const float *q, const int count, const void *keys, const void *values,
                                  const int kind, int64_t first, int64_t last, int64_t size, float cap,
                                  float *out) {
    float score[MAX_QUERIES * SECTION], peak[MAX_QUERIES], sum[MAX_QUERIES];
    for (int g = 0; g < count; ++g) peak[g] = -INFINITY, sum[g] = 0;
    for (int64_t c = 0; c < count * size; ++c) out[c] = 0;
    for (int64_t start = first; start < last; start += SECTION) {
        const int64_t slots = last - start < SECTION ? last - start : SECTION;
        const int64_t sections = (slots * count + SECTION - 1) / SECTION;
        FN(scores)(q, count, keys, values, kind, start, slots, size, score);
        if (cap > 0) FN(cap)(score, slots * count, cap);
        for (int64_t c = slots * count; c < sections * SECTION; ++c) score[c] = -INFINITY;
        float highest[SECTION], added[SECTION] = {0}, before[MAX_QUERIES];
        for (int i = 0; i < SECTION; ++i) highest[i] = score[i];
        for (int64_t n = 1; n < sections; ++n)
            for (int i = 0; i < SECTION; ++i) {
                const float one = score[n * SECTION + i];
                highest[i] = one > highest[i] ? one : highest[i];
            }
        for (int g = 0; g < count; ++g) {
            before[g] = peak[g];
            for (int i = g; i < SECTION; i += count) peak[g] = highest[i] > peak[g] ? highest[i] : peak[g];
            for (int i = g; i < SECTION; i += count) highest[i] = peak[g];
        }
        for (int64_t n = 0; n < sections; ++n)
            for (int i = 0; i < SECTION; ++i) {
                const float one = FN(exponential)(score[n * SECTION + i] - highest[i]);
                score[n * SECTION + i] = one;
                added[i] += one;
            }
        for (int g = 0; g < count; ++g) {
            const float fade = FN(exponential)(before[g] - peak[g]);
            sum[g] *= fade;
            for (int i = g; i < SECTION; i += count) sum[g] += added[i];
            if (start > first)
                for (int64_t c = 0; c < size; ++c) out[g * size + c] *= fade;
        }
        FN(mix)(score, count, values, kind, start, slots, size, out);
    }
    for (int g = 0; g < count; ++g)
        for (int64_t c = 0; c < size; ++c) out[g * size + c] /= sum[g];
}

#define ATTEND(count, kind) FN(attend_few)(q, count, keys, values, kind, first, last, size, cap, out)

/* out [count][size]: attention of `count` scaled queries that share keys and values [slots][size], over first..last;
   scores are capped where cap is not 0 */
static TARGET void FN(attend)(const float *q, int count, const void *keys, const void *values, int kind, int64_t first,
                              int64_t last, int64_t size, float cap, float *out) {
    for (; count > 0; count -= MAX_QUERIES, q += MAX_QUERIES * size, out += MAX_QUERIES * size) {
        if (kind == BFLOAT16) {
            if (count >= 4) ATTEND(4, BFLOAT16);
            else if (count == 3) ATTEND(3, BFLOAT16);
            else if (count == 2) ATTEND(2, BFLOAT16);
            else ATTEND(1, BFLOAT16);
        } else {
            if (count >= 4) ATTEND(4, FLOAT32);
            else if (count == 3) ATTEND(3, FLOAT32);
            else if (count == 2) ATTEND(2, FLOAT32);
            else ATTEND(1, FLOAT32);
        }
    }
}

static const kernels_t FN(kernels) = {
    NAME, FN(prepare), FN(multiply), FN(expand), FN(norm), FN(activate), FN(rotate), FN(attend), FN(cap),
};

#undef ATTEND
#undef SUMS
#undef SECTION
#undef MAX_QUERIES
