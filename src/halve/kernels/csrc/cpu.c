/* Instruction sets and the functions that cpu.py calls. The kernels are in cpu_body.h, the layout in cpu.h.

   Needs GNU C (gcc or clang): vector extensions and `target` attributes. One object serves every processor of its
   architecture; halve_cpu_kernels picks among what was compiled. */

#include "cpu.h"

#include "threads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define FN(name) PASTE(name, ISA)

/* ---- attention: the numbers of a head that fill no vector; few models have any, so they stay out of its loops ---- */

static NOINLINE float rest_of_score(const float *q, const void *keys, int kind, int64_t at, int64_t from,
                                    int64_t size) {
    float total = 0;
    for (int64_t c = from; c < size; ++c) total += number_at(keys, kind, at + c) * q[c];
    return total;
}

static NOINLINE void rest_of_mix(const float *score, int count, const void *values, int kind, int64_t first,
                                 int64_t slots, int64_t from, int64_t size, float *out) {
    for (int64_t s = 0; s < slots; ++s)
        for (int g = 0; g < count; ++g)
            for (int64_t c = from; c < size; ++c)
                out[g * size + c] += score[s * count + g] * number_at(values, kind, (first + s) * size + c);
}

/* ---- any processor: 128-bit vectors in GNU C, which is NEON on aarch64 and SSE on x86 ---- */

typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef float f32x4 __attribute__((vector_size(16)));

INLINE i32x4 load_u8x4(const uint8_t *p) { return (i32x4){p[0], p[1], p[2], p[3]}; }
INLINE f32x4 load_bf16x4(const uint16_t *p) {
    return (f32x4){from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])};
}
INLINE i32x4 load_i32x4(const void *p) {
    i32x4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE f32x4 load_f32x4(const float *p) {
    f32x4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_f32x4(float *p, f32x4 v) { memcpy(p, &v, sizeof v); }
INLINE f32x4 sums_f32x4(f32x4 a, f32x4 b, f32x4 c, f32x4 d) {
    return (f32x4){a[0], b[0], c[0], d[0]} + (f32x4){a[1], b[1], c[1], d[1]} +
           (f32x4){a[2], b[2], c[2], d[2]} + (f32x4){a[3], b[3], c[3], d[3]};
}
INLINE i32x4 low_halves(i32x4 v) { return (i32x4)((u32x4)v << 16) >> 16; }

/* packed weights, far enough ahead; without it a fifth of the bandwidth was lost on Zen 3 */
#define FETCH_FAR(p) __builtin_prefetch((p) + 640, 0, 3)

#define ISA generic
#define NAME "generic"
#define TARGET
#define LANES 4
#define PASS 2
#define ROW_BY_ROW 0
#define FETCH_WORD(p) FETCH_FAR(p)
#define FETCH_SEGMENT(p)
#define VI i32x4
#define VF f32x4
#define LOAD(p) load_i32x4(p)
#define LOAD_F32(p) load_f32x4(p)
#define LOAD_BF16(p) load_bf16x4(p)
#define LOAD_F16(p) load_bf16x4(p) /* never reached: cpu.py widens half scales for this one */
#define LOAD_U8(p) load_u8x4(p)
#define STORE_F32(p, v) store_f32x4(p, v)
#define SET1(a) ((i32x4){(a), (a), (a), (a)})
#define SET1_F(a) ((f32x4){(a), (a), (a), (a)})
#define ZERO_F() ((f32x4){0, 0, 0, 0})
#define AND(a, b) ((a) & (b))
#define OR(a, b) ((a) | (b))
#define SHIFT16(a, n) ((i32x4)((u16x8)(a) >> (n)))
#define SHIFT32(a, n) ((i32x4)((u32x4)(a) >> (n)))
#define SHIFT_BY(a, n) SHIFT32(a, n)
#define SHIFT_LEFT(a, n) ((i32x4)((u32x4)(a) << (n)))
#define SHIFT_SIGNED32(a, n) ((a) >> (n))
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define BYTES 0
#define DOT(acc, a, b) ((acc) + low_halves(a) * low_halves(b) + ((a) >> 16) * ((b) >> 16))
#define TO_FLOAT(a) __builtin_convertvector(a, f32x4)
#define AS_FLOAT(a) ((f32x4)(a))
#define FMA(a, b, c) ((a) * (b) + (c))
#define MUL_F(a, b) ((a) * (b))
#define ADD_F(a, b) ((a) + (b))
#define SUB_F(a, b) ((a) - (b))
#define STORE_SUMS(p, a, b, c, d) store_f32x4(p, sums_f32x4(a, b, c, d))
#include "cpu_body.h"
#include "cpu_layer.h"
#include "cpu_undef.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* ---- x86 with AVX2, FMA and F16C (2013 on) ---- */

__attribute__((target("avx2"))) INLINE __m128 sums_f32x8(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d)); /* of each half */
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

#define ISA avx2
#define NAME "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu_avx2.h"
#define BYTES 0
#define DOT(acc, a, b) _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
#include "cpu_body.h"
#include "cpu_layer.h"
#include "cpu_undef.h"

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_AVX_VNNI
#define ISA avxvnni
#define NAME "avx-vnni"
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#include "cpu_avx2.h"
#define BYTES 1
#define DOT(acc, a, b) _mm256_dpbusd_avx_epi32(acc, a, b)
#include "cpu_body.h"
#include "cpu_layer.h"
#include "cpu_undef.h"
#endif

/* ---- x86 with AVX-512 and its VNNI (servers from 2019 on) ---- */

#define ISA avx512
#define NAME "avx512-vnni"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define LANES 16
#define PASS 8
#define ROW_BY_ROW 4096
/* Zen 4 fetches a run of memory better by itself, but stops at the end of a page: only what begins the next page */
#define FETCH_WORD(p)
#define FETCH_SEGMENT(p) (__builtin_prefetch((p) + 1024, 0, 2), __builtin_prefetch((p) + 1040, 0, 2))
#define VI __m512i
#define VF __m512
#define LOAD(p) _mm512_loadu_si512(p)
#define LOAD_F32(p) _mm512_loadu_ps(p)
#define LOAD_BF16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define LOAD_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_U8(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define STORE_F32(p, v) _mm512_storeu_ps(p, v)
#define SET1(a) _mm512_set1_epi32(a)
#define SET1_F(a) _mm512_set1_ps(a)
#define ZERO_F() _mm512_setzero_ps()
#define AND(a, b) _mm512_and_si512(a, b)
#define OR(a, b) _mm512_or_si512(a, b)
#define SHIFT16(a, n) _mm512_srli_epi16(a, n)
#define SHIFT32(a, n) _mm512_srli_epi32(a, n)
#define SHIFT_BY(a, n) _mm512_srl_epi32(a, _mm_cvtsi32_si128(n))
#define SHIFT_LEFT(a, n) _mm512_slli_epi32(a, n)
#define SHIFT_SIGNED32(a, n) _mm512_srai_epi32(a, n)
#define ADD(a, b) _mm512_add_epi32(a, b)
#define MUL(a, b) _mm512_mullo_epi32(a, b)
#define BYTES 1
#define DOT(acc, a, b) _mm512_dpbusd_epi32(acc, a, b)
#define TO_FLOAT(a) _mm512_cvtepi32_ps(a)
#define AS_FLOAT(a) _mm512_castsi512_ps(a)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MUL_F(a, b) _mm512_mul_ps(a, b)
#define ADD_F(a, b) _mm512_add_ps(a, b)
#define SUB_F(a, b) _mm512_sub_ps(a, b)
#define STORE_SUMS(p, a, b, c, d) \
    _mm_storeu_ps(p, sums_f32x8(HALVES(a), HALVES(b), HALVES(c), HALVES(d)))
#define HALVES(a) _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))
#include "cpu_body.h"
#include "cpu_layer.h"
#include "cpu_undef.h"
#endif

/* ---- choice of instruction set ---- */

/* The kernels of instruction set `name`, or the best ones here (NULL); NULL when this processor lacks them. */
const kernels_t *halve_cpu_kernels(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && (!name || !strcmp(name, kernels_avx512.name)))
        return &kernels_avx512;
#ifdef HAS_AVX_VNNI
    unsigned eax = 0, ebx, ecx, edx; /* leaf 7.1, bit 4 of eax: not every compiler knows its name */
    const int avx_vnni = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
    if (avx2 && avx_vnni && (!name || !strcmp(name, kernels_avxvnni.name))) return &kernels_avxvnni;
#endif
    if (avx2 && (!name || !strcmp(name, kernels_avx2.name))) return &kernels_avx2;
#endif
    return !name || !strcmp(name, kernels_generic.name) ? &kernels_generic : NULL;
}

/* ---- called from cpu.py ---- */

static const char *check_segments(const weight_t *w) {
    const int64_t longest = MAX_SEGMENT / (32 / w->bits);
    int64_t word = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t size = w->segment_end[s] - word;
        if (size < 1 || size > longest) return "a segment that is empty or too long";
        if (w->segment_group[s] < 0 || w->segment_group[s] >= w->groups) return "a segment of a group that is not there";
        word += size;
    }
    return word == w->words ? NULL : "segments that end before or behind the words";
}

const char *halve_cpu_check(const weight_t *w) {
    if (!w->kernels || !w->codes) return "no codes";
    if (w->rows < 1 || w->in_features < 1) return "no rows or no columns";
    if (!w->scale) {
        if (w->dense_kind != FLOAT32 && w->dense_kind != BFLOAT16) return "numbers of another kind";
        return w->columns == w->in_features ? NULL : "columns that are not the inputs";
    }
    if (w->bits != 2 && w->bits != 4 && w->bits != 8) return "codes of another width";
    if (w->scale_kind != FLOAT32 && w->scale_kind != BFLOAT16 && w->scale_kind != FLOAT16) return "scales of another kind";
    if (w->columns != w->words * (32 / w->bits)) return "columns that are not the words'";
    if (!w->segment_end || !w->segment_group || w->groups < 1 || w->segments < 1) return "no segments";
    if (!w->order && w->columns != w->in_features) return "padding and no order";
    for (int64_t c = 0; w->order && c < w->columns; ++c)
        if (w->order[c] < -1 || w->order[c] >= w->in_features) return "a column of an input that is not there";
    return check_segments(w);
}

const char *halve_cpu_name(const kernels_t *kernels) { return kernels->name; }

/* Whether torch's matmul has vector instructions for bfloat16 here. */
int halve_cpu_has_bf16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* Whether torch's matmul has tiles for bfloat16 here (AMX): several times what vector instructions can do. */
int halve_cpu_has_tiles(void) {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx = 0; /* leaf 7, bit 22 of edx: AMX-BF16 */
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
    return 0;
#endif
}

/* Ask for large pages behind memory that will be read again and again: fewer look-ups of addresses on the way. With
   `filled` it has contents already, which move. Where the system cannot, nothing changes. */
void halve_cpu_large_pages(void *memory, int64_t bytes, int filled) {
#if defined(__linux__)
    enum { PAGE = 1 << 21, HUGEPAGE = 14, COLLAPSE = 25 }; /* MADV_: older headers lack the last */
    const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)memory + (uintptr_t)bytes) / PAGE * PAGE;
    if (last > first) (void)madvise((void *)first, last - first, filled ? COLLAPSE : HUGEPAGE);
#endif
}

typedef struct {
    const weight_t *weight;
    rows_t x;
    void *y;
    int kind;
} product_t;

static void product_blocks(void *data, int64_t first, int64_t last) {
    const product_t *p = data;
    const weight_t *w = p->weight;
    float y[MAX_COUNT * ROWS];
    for (int64_t block = first; block < last; ++block) {
        w->kernels->multiply(w, &p->x, block, y);
        const int64_t row = block * ROWS, size = w->rows - row < ROWS ? w->rows - row : ROWS;
        for (int64_t m = 0; m < p->x.count; ++m)
            for (int64_t r = 0; r < size; ++r) {
                const int64_t at = m * w->rows + row + r;
                if (p->kind == BFLOAT16) ((uint16_t *)p->y)[at] = to_bf16(y[m * ROWS + r]);
                else ((float *)p->y)[at] = y[m * ROWS + r];
            }
    }
}

/* y [count][rows] = x [count][in_features] W^T, x and y in `kind`. 0, or -1 when memory ran out. */
int halve_cpu_multiply(const weight_t *w, const void *x, void *y, int64_t count, int kind) {
    /* scratch grows to the largest product seen and stays with its thread */
    static _Thread_local char *scratch;
    static _Thread_local int64_t scratch_size;
    const int64_t most = count < MAX_COUNT ? count : MAX_COUNT;
    rows_t rows;
    uintptr_t need = 0, at;
    take_rows(&need, &rows, most, w->columns, w->segments);
    if ((int64_t)need > scratch_size) {
        free(scratch);
        scratch = malloc(need);
        scratch_size = scratch ? (int64_t)need : 0;
        if (!scratch) return -1;
    }
    at = (uintptr_t)scratch;
    take_rows(&at, &rows, most, w->columns, w->segments);
    const int64_t x_bytes = w->in_features * (kind == BFLOAT16 ? 2 : 4), y_bytes = w->rows * (kind == BFLOAT16 ? 2 : 4);
    const int64_t bytes = w->scale ? w->words * 4 : w->columns * (w->dense_kind == BFLOAT16 ? 2 : 4);
    for (int64_t first = 0; first < count; first += MAX_COUNT) {
        const int64_t size = count - first < MAX_COUNT ? count - first : MAX_COUNT;
        rows.count = size;
        for (int64_t m = 0; m < size; ++m)
            w->kernels->prepare(w, (const char *)x + (first + m) * x_bytes, kind, &rows, m);
        product_t product = {w, rows, (char *)y + first * y_bytes, kind};
        for_all((w->rows + ROWS - 1) / ROWS, bytes * w->rows * (size + 1) / 2, product_blocks, &product);
    }
    return 0;
}

typedef struct {
    const weight_t *weight;
    int64_t first;
    int kind;
    char *out;
    int64_t stride;
} expansion_t;

static void expand_blocks(void *data, int64_t first, int64_t last) {
    const expansion_t *e = data;
    const int64_t block_bytes = ROWS * (e->kind == BFLOAT16 ? 2 : 4);
    for (int64_t block = first; block < last; ++block)
        e->weight->kernels->expand(e->weight, e->first + block, e->kind, e->out + block * block_bytes, e->stride);
}

/* out[in_features][stride] in `kind`: the transposed numbers of `blocks` packed blocks from `first` on. */
void halve_cpu_expand(const weight_t *w, int64_t first, int64_t blocks, int kind, void *out, int64_t stride) {
    expansion_t expansion = {w, first, kind, out, stride};
    for_all(blocks, blocks * ROWS * w->words * 4, expand_blocks, &expansion);
}

/* ---- packing: from the stored bit stream (quantization.pack) into blocks ---- */

typedef struct {
    const weight_t *weight;
    const uint32_t *packed;
    int64_t packed_words;
    int source_bits;
    uint32_t *codes;
} packing_t;

static void pack_blocks(void *data, int64_t first, int64_t last) {
    const packing_t *p = data;
    const weight_t *w = p->weight;
    const int per_word = 32 / w->bits, source = p->source_bits;
    for (int64_t row = first * ROWS; row < last * ROWS; ++row) {
        uint32_t *target = p->codes + row / ROWS * w->words * ROWS + row % ROWS;
        const uint32_t *stream = p->packed + row * p->packed_words;
        for (int64_t word = 0; word < w->words; ++word) {
            uint32_t value = 0;
            for (int c = 0; row < w->rows && c < per_word; ++c) {
                const int64_t column = word * per_word + c, at = w->order ? w->order[column] : column;
                if (at < 0) continue;
                const int64_t bit = at * source, from = bit / 32, shift = bit % 32;
                uint64_t code = stream[from] >> shift;
                if (shift + source > 32) code |= (uint64_t)stream[from + 1] << (32 - shift);
                value |= (uint32_t)(code & ((1u << source) - 1)) << (c % 4 * 8 + c / 4 * w->bits);
            }
            target[word * ROWS] = value;
        }
    }
}

/* Fill `codes` of w from packed [rows][packed_words], codes of `source_bits` (w->bits, or 3 kept in 4) as stored. 0, or -1
   where rows of so many words hold fewer codes. */
int halve_cpu_pack(const weight_t *w, const void *packed, int64_t packed_words, int source_bits, void *codes) {
    if (source_bits < 1 || source_bits > w->bits || packed_words * 32 < w->in_features * source_bits) return -1;
    packing_t packing = {w, packed, packed_words, source_bits, codes};
    for_all((w->rows + ROWS - 1) / ROWS, w->rows * w->words * 4, pack_blocks, &packing);
    return 0;
}

/* ---- rows looked up, as an embedding's are ---- */

static float scale_at(const weight_t *w, int64_t at) {
    return w->scale_kind == FLOAT16 ? from_f16(((const uint16_t *)w->scale)[at]) : number_at(w->scale, w->scale_kind, at);
}

void halve_cpu_row(const weight_t *w, int64_t row, float *out) {
    for (int64_t c = 0; !w->scale && c < w->columns; ++c) out[c] = number_at(w->codes, w->dense_kind, row * w->columns + c);
    if (!w->scale) return;
    const int64_t block = row / ROWS, lane = row % ROWS;
    const uint32_t *words = (const uint32_t *)w->codes + block * w->words * ROWS + lane;
    const int per_word = 32 / w->bits;
    int64_t word = 0;
    for (int64_t s = 0; s < w->segments; ++s) {
        const int64_t at = (block * w->groups + w->segment_group[s]) * ROWS + lane;
        const float scale = scale_at(w, at);
        const int zero = w->zero ? w->zero[at] : w->offset;
        for (; word < w->segment_end[s]; ++word)
            for (int c = 0; c < per_word; ++c) {
                const int64_t column = word * per_word + c, to = w->order ? w->order[column] : column;
                const uint32_t code = words[word * ROWS] >> (c % 4 * 8 + c / 4 * w->bits) & ((1u << w->bits) - 1);
                if (to >= 0) out[to] = (float)((int)code - zero) * scale;
            }
    }
}

typedef struct {
    const weight_t *weight;
    const int64_t *rows;
    float *out;
} look_up_t;

static void look_up_rows(void *data, int64_t first, int64_t last) {
    const look_up_t *l = data;
    for (int64_t m = first; m < last; ++m) halve_cpu_row(l->weight, l->rows[m], l->out + m * l->weight->in_features);
}

/* out [count][in_features] = the numbers of some rows. 0, or -1 where one of them is not there. */
int halve_cpu_look_up(const weight_t *w, const int64_t *rows, int64_t count, float *out) {
    for (int64_t m = 0; m < count; ++m)
        if (rows[m] < 0 || rows[m] >= w->rows) return -1;
    look_up_t look_up = {w, rows, out};
    for_all(count, count * w->in_features * 4, look_up_rows, &look_up);
    return 0;
}

const declaration_t *halve_cpu_declarations(void) {
    static const declaration_t table[] = {
        CONSTANT(ROWS),
        CONSTANT(MAX_SEGMENT),
        CONSTANT(MAX_COUNT),
        STRUCTURE(weight_t),
        FIELD(weight_t, kernels),
        FIELD(weight_t, codes),
        FIELD(weight_t, scale),
        FIELD(weight_t, zero),
        FIELD(weight_t, order),
        FIELD(weight_t, segment_end),
        FIELD(weight_t, segment_group),
        FIELD(weight_t, rows),
        FIELD(weight_t, in_features),
        FIELD(weight_t, columns),
        FIELD(weight_t, words),
        FIELD(weight_t, groups),
        FIELD(weight_t, segments),
        FIELD(weight_t, bits),
        FIELD(weight_t, offset),
        FIELD(weight_t, scale_kind),
        FIELD(weight_t, dense_kind),
        FIELD(weight_t, exact),
        FUNCTION(halve_cpu_kernels, const kernels_t *, const char *),
        FUNCTION(halve_cpu_name, const char *, const kernels_t *),
        FUNCTION(halve_cpu_set_threads, void, start_t, count_t),
        FUNCTION(halve_cpu_has_bf16, int, void),
        FUNCTION(halve_cpu_has_tiles, int, void),
        FUNCTION(halve_cpu_large_pages, void, void *, int64_t, int),
        FUNCTION(halve_cpu_multiply, int, const weight_t *, const void *, void *, int64_t, int),
        FUNCTION(halve_cpu_expand, void, const weight_t *, int64_t, int64_t, int, void *, int64_t),
        FUNCTION(halve_cpu_check, const char *, const weight_t *),
        FUNCTION(halve_cpu_pack, int, const weight_t *, const void *, int64_t, int, void *),
        FUNCTION(halve_cpu_look_up, int, const weight_t *, const int64_t *, int64_t, float *),
        {0},
    };
    return table;
}
