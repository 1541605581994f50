/* Vectors of AVX-512: 16 float32 numbers, and six rows by four of them in its 32 registers. */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "common.h"

#define FORM(NAME) NAME##_avx512
#define LANES 16
#define VECTORS 4
#define HAS_BFLOAT16 1

typedef __m512 vec;
typedef __m512i ivec;
typedef __mmask16 lanes;

INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_of(float x) { return _mm512_set1_ps(x); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec x) { _mm512_storeu_ps(to, x); }

INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec subtract(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec times_plus(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec minus_times(vec c, vec a, vec b) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec absolute(vec x) { return _mm512_abs_ps(x); }
INLINE vec signed_as(vec number, vec sign) { return _mm512_or_ps(number, _mm512_and_ps(sign, vec_of(-0.0f))); }
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec times_power_of_2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float highest_of(vec x) { return _mm512_reduce_max_ps(x); }
INLINE float lowest_of(vec x) { return _mm512_reduce_min_ps(x); }

INLINE lanes above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE lanes nan_lanes(vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
INLINE lanes either(lanes a, lanes b) { return a | b; }
INLINE int any(lanes which) { return which != 0; }
INLINE lanes first_lanes(int count) { return (lanes)((1u << count) - 1u); }
INLINE vec choose(lanes which, vec x, vec otherwise) { return _mm512_mask_mov_ps(otherwise, which, x); }
/* Lanes that are left out are not read. */
INLINE vec load_or(lanes which, const float *from, vec otherwise) { return _mm512_mask_loadu_ps(otherwise, which, from); }
INLINE void store_first(float *to, int count, vec x) { _mm512_mask_storeu_ps(to, first_lanes(count), x); }

INLINE ivec integers(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ivec load_integers(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store_integers(void *to, ivec x) { _mm512_storeu_si512(to, x); }
INLINE ivec add_integers(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE ivec times_integers(ivec a, ivec b) { return _mm512_mullo_epi32(a, b); }
INLINE ivec rounded(vec x) { return _mm512_cvtps_epi32(x); }
INLINE vec floats(ivec x) { return _mm512_cvtepi32_ps(x); }
/* As uint8, the numbers beyond which become its bounds. */
INLINE void store_bytes(uint8_t *to, ivec x) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(_mm512_max_epi32(x, _mm512_setzero_si512())));
}
INLINE vec load_bytes(const int8_t *from) { return floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from))); }
INLINE vec load_bfloat16(const uint16_t *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* To each sum the products of four uint8 and four int8 numbers. Assembly, because GCC 12 copies the sums to and fro around
   the intrinsic, which halves the speed. */
#define ADD_DOTS(SUMS, UNSIGNED, SIGNED) __asm__("vpdpbusd %2, %1, %0" : "+v"(SUMS) : "v"(UNSIGNED), "v"(SIGNED))

/* 16 vectors of 16 words: row i's word j goes to row j's place i. Four rounds, each of pairs of rows. */
INLINE void transpose(ivec rows[LANES]) {
  ivec half[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + j + 2]);
    }
  /* Here rows[4 a + b] holds, in each of its four parts c, word 4 c + b of rows 4 a to 4 a + 3. */
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    half[b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
    half[4 + b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
    half[8 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    half[12 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
  }
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    rows[b] = _mm512_shuffle_i32x4(half[b], half[8 + b], 0x88);
    rows[4 + b] = _mm512_shuffle_i32x4(half[4 + b], half[12 + b], 0x88);
    rows[8 + b] = _mm512_shuffle_i32x4(half[b], half[8 + b], 0xdd);
    rows[12 + b] = _mm512_shuffle_i32x4(half[4 + b], half[12 + b], 0xdd);
  }
}
