/* The vector operations of AVX2, FMA and F16C; DOT, which AVX-VNNI has in one instruction, comes from cpu.c. */
#define LANES 8
#define PASS 2
#define ROW_BY_ROW 0
#define FETCH_WORD(p) FETCH_FAR(p)
#define FETCH_SEGMENT(p)
#define VI __m256i
#define VF __m256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_F32(p) _mm256_loadu_ps(p)
#define LOAD_BF16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define LOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_U8(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define STORE_F32(p, v) _mm256_storeu_ps(p, v)
#define SET1(a) _mm256_set1_epi32(a)
#define SET1_F(a) _mm256_set1_ps(a)
#define ZERO_F() _mm256_setzero_ps()
#define AND(a, b) _mm256_and_si256(a, b)
#define OR(a, b) _mm256_or_si256(a, b)
#define SHIFT16(a, n) _mm256_srli_epi16(a, n)
#define SHIFT32(a, n) _mm256_srli_epi32(a, n)
#define SHIFT_BY(a, n) _mm256_srl_epi32(a, _mm_cvtsi32_si128(n))
#define SHIFT_LEFT(a, n) _mm256_slli_epi32(a, n)
#define SHIFT_SIGNED32(a, n) _mm256_srai_epi32(a, n)
#define ADD(a, b) _mm256_add_epi32(a, b)
#define MUL(a, b) _mm256_mullo_epi32(a, b)
#define TO_FLOAT(a) _mm256_cvtepi32_ps(a)
#define AS_FLOAT(a) _mm256_castsi256_ps(a)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL_F(a, b) _mm256_mul_ps(a, b)
#define ADD_F(a, b) _mm256_add_ps(a, b)
#define SUB_F(a, b) _mm256_sub_ps(a, b)
#define STORE_SUMS(p, a, b, c, d) _mm_storeu_ps(p, sums_f32x8(a, b, c, d))
