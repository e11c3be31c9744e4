/* Matrix-vector and small-batch products with packed or dense weights: what the C side and cpu.py agree on.

   Packed weights lie in blocks of ROWS output rows; inside a block, word t holds the same columns of all ROWS rows:

       codes  uint32 [blocks][words][ROWS]      32 / bits codes a word, unsigned (code + offset)
       scale         [blocks][groups][ROWS]     float, bfloat16 or half
       zero   uint8  [blocks][groups][ROWS]     zero point + offset, or NULL: every zero point is 0

   so that a block is read front to back, every vector lane stands for one output row, and one value of x serves all.
   Column c of a word is at bit c % 4 * 8 + c / 4 * bits: level n = c / 4, shifted down and masked, is four bytes, or
   twice two 16-bit integers (its even columns, then its odd ones), the operands of a widening multiply-add.

   A segment is a run of at most 128 columns of one group. Each row of x is rounded segment by segment to 16-bit
   integers under one scale, multiplied in integers, and added up in float32:

       y[r] = sum over segments s: scale[r, group(s)] * x_scale[s] * sum over columns: (code - zero) * x_code

   Under the scale of one large number its neighbours would lose their bits. So numbers far above the median of their
   segment are no codes: they are listed, and multiplied as they are on top (prepare in cpu_body.h says which). Weights
   made for float32 (`exact`) are multiplied by all of x as it is.

   A segment of x is held as two planes, one 32-bit unit of each for every four columns. Where there is a dot product of
   bytes, they are the low and the high bytes of the codes, x_code = low + 256 * high with both signed, and the sums of
   the second count 256 times; elsewhere even and odd columns.
*/
#ifndef HALVE_CPU_H
#define HALVE_CPU_H

#include <stddef.h>
#include <stdint.h>

enum { ROWS = 16, MAX_SEGMENT = 128, MAX_COUNT = 64 }; /* MAX_COUNT rows of x at a time: as many as the cache holds */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { LARGEST_CODE = 127 * 256 + 127 }; /* of x: both bytes of it are at most 127 */
enum { SILU = 0, RELU = 1, GELU_TANH = 2, GELU = 3, RELU_SQUARED = 4 };

struct kernels;

typedef struct {
    const struct kernels *kernels; /* of the instruction set in use */
    const void *codes;            /* packed: as above; dense: [rows][columns] in dense_kind */
    const void *scale;            /* NULL: the weight is dense */
    const uint8_t *zero;          /* or NULL */
    const int32_t *order;         /* [columns] which x each stored column reads, -1 for padding; NULL: in order */
    const int32_t *segment_end;   /* [segments] first word after the segment */
    const int32_t *segment_group; /* [segments] */
    int64_t rows;
    int64_t in_features; /* length of a row of x */
    int64_t columns;     /* stored columns, a multiple of the codes in a word; dense: in_features */
    int64_t words;       /* per row */
    int64_t groups;
    int64_t segments;
    int32_t bits;       /* 2, 4 or 8 */
    int32_t offset;     /* code + offset is what is stored */
    int32_t scale_kind; /* FLOAT32, BFLOAT16 or FLOAT16 */
    int32_t dense_kind; /* FLOAT32 or BFLOAT16 */
    int32_t exact;      /* packed: x is not rounded */
} weight_t;

/* A number of x that is no code, and where the codes it meets are. */
typedef struct {
    int32_t word, shift, group;
    float value;
} outlier_t;

/* x of `count` rows, prepared once per product for all threads. */
typedef struct {
    int64_t count;
    float *values;          /* dense and exact: [count][columns], for bfloat16 weights even columns apart from odd ones */
    int32_t *planes;        /* packed: [count][columns / 2], segment by segment its first plane, then its second */
    float *scale;           /* packed: [count][segments] */
    int32_t *code_sum;      /* packed: [count][segments] */
    outlier_t *outliers;    /* packed: [count][columns], segment by segment */
    int32_t *outlier_end;   /* packed: [count][segments], where those of each end */
} rows_t;

/* One instruction set's functions. */
typedef struct kernels {
    const char *name;
    /* row m of `rows` from x [in_features] in `kind` */
    void (*prepare)(const weight_t *w, const void *x, int kind, const rows_t *rows, int64_t m);
    /* y [count][ROWS] of one block */
    void (*multiply)(const weight_t *w, const rows_t *x, int64_t block, float *y);
    /* transposed numbers of one packed block: out[column * stride + row] in FLOAT32 or BFLOAT16 */
    void (*expand)(const weight_t *w, int64_t block, int kind, void *out, int64_t stride);
    /* between the products of a decode step: see cpu_layer.h */
    void (*norm)(const float *x, int64_t n, const void *weight, const void *bias, int kind, int rms, float eps,
                 float *out);
    void (*activate)(const float *gate, const float *up, int64_t n, int activation, float *out);
    void (*rotate)(float *q, const float *cosine, const float *sine, int64_t size);
    void (*attend)(const float *q, int count, const void *keys, const void *values, int kind, int64_t first,
                   int64_t last, int64_t size, float cap, float *out);
    void (*cap)(float *x, int64_t n, float cap);
} kernels_t;

/* In a few words why the kernels cannot read a weight, NULL where they can: sizes that contradict each other, or an
   index that points outside. */
const char *halve_cpu_check(const weight_t *w);

/* The numbers of one row, out [in_features]; the row has to be there. */
void halve_cpu_row(const weight_t *w, int64_t row, float *out);

/* ---- scratch memory, handed out from an address on; from 0 on, what is reached in the end is the size ---- */

static inline void *take(uintptr_t *at, int64_t bytes) {
    void *taken = (void *)*at;
    *at += (uintptr_t)(bytes + 63) / 64 * 64;
    return taken;
}

/* Room for `count` rows of x, by the stored columns and segments of the largest weight that reads them. */
static inline void take_rows(uintptr_t *at, rows_t *rows, int64_t count, int64_t columns, int64_t segments) {
    rows->count = count;
    rows->values = take(at, count * columns * 4);
    rows->planes = take(at, count * columns * 2);
    rows->scale = take(at, count * segments * 4);
    rows->code_sum = take(at, count * segments * 4);
    rows->outliers = take(at, count * columns * (int64_t)sizeof(outlier_t));
    rows->outlier_end = take(at, count * segments * 4);
}

/* ---- what structures.py compares with its own when it loads the library ---- */

typedef struct {
    const char *owner;    /* a structure, a function or a constant; NULL ends a table */
    const char *member;   /* a field; of a function its type; else "" */
    int64_t offset, size; /* in bytes; of a constant, size is its value */
} declaration_t;

#define STRUCTURE(type) {#type, "", 0, sizeof(type)}
#define FIELD(type, field) {#type, #field, offsetof(type, field), sizeof(((type *)0)->field)}
#define CONSTANT(name) {#name, "", 0, name}
/* does not compile where the type is not the function's */
#define FUNCTION(name, result, ...)                                                                               \
    {#name, #result "(" #__VA_ARGS__ ")", 0,                                                                      \
     sizeof(struct {                                                                                              \
         _Static_assert(__builtin_types_compatible_p(__typeof__(name), result(__VA_ARGS__)), #name);              \
         char byte;                                                                                               \
     }) * 0}

#if defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+v"(v)) /* keeps the compiler from regrouping sums, which spills them */
#else
#define IN_REGISTER(v)
#endif
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

INLINE float bits_float(int32_t bits) {
    union { int32_t i; float f; } v = {bits};
    return v.f;
}

INLINE int32_t float_bits(float value) {
    union { float f; int32_t i; } v = {value};
    return v.i;
}

/* magnitudes of floats order as their bits do; infinities and NaN come last */
INLINE int32_t magnitude_bits(float value) { return float_bits(value) & 0x7fffffff; }

INLINE float from_bf16(uint16_t bits) { return bits_float((int32_t)((uint32_t)bits << 16)); }

INLINE float number_at(const void *numbers, int kind, int64_t at) { /* FLOAT32 or BFLOAT16 */
    return kind == BFLOAT16 ? from_bf16(((const uint16_t *)numbers)[at]) : ((const float *)numbers)[at];
}

INLINE float from_f16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -1 : 1) * (float)fraction * 0x1p-24f;
    return bits_float((int32_t)(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13));
}

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even; a NaN stays one */
    const uint32_t bits = (uint32_t)float_bits(value);
    return (uint16_t)(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
