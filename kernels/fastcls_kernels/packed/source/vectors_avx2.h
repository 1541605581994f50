/* Vectors of AVX2: 8 float32 numbers, and six rows by two of them in its 16 registers. Int8 products need AVX-VNNI. */
#pragma GCC target("avx2,fma")
#include "common.h"

#define FORM(NAME) NAME##_avx2
#define LANES 8
#define VECTORS 2
#define HAS_BFLOAT16 0

typedef __m256 vec;
typedef __m256i ivec;
typedef __m256 lanes; /* all bits of a lane, or none */

INLINE vec zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_of(float x) { return _mm256_set1_ps(x); }
INLINE vec load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, vec x) { _mm256_storeu_ps(to, x); }

INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec subtract(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec times(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec times_plus(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec minus_times(vec c, vec a, vec b) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec absolute(vec x) { return _mm256_andnot_ps(vec_of(-0.0f), x); }
INLINE vec signed_as(vec number, vec sign) { return _mm256_or_ps(number, _mm256_and_ps(sign, vec_of(-0.0f))); }
INLINE vec nearest(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* 2^n, n an integer from -126 to 127. */
INLINE vec power_of_2(ivec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

/* In two factors, since 2^n itself may be no normal number. */
INLINE vec times_power_of_2(vec x, vec n) {
  const ivec whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return times(times(x, power_of_2(half)), power_of_2(_mm256_sub_epi32(whole, half)));
}

#define REDUCE(NAME, OPERATION)                                                          \
  INLINE float NAME(vec x) {                                                             \
    __m128 y = OPERATION(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));        \
    y = OPERATION(y, _mm_movehl_ps(y, y));                                               \
    return _mm_cvtss_f32(OPERATION(y, _mm_shuffle_ps(y, y, 1)));                         \
  }
REDUCE(sum_of, _mm_add_ps)
REDUCE(highest_of, _mm_max_ps)
REDUCE(lowest_of, _mm_min_ps)

INLINE lanes above(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE lanes nan_lanes(vec x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
INLINE lanes either(lanes a, lanes b) { return _mm256_or_ps(a, b); }
INLINE int any(lanes which) { return _mm256_movemask_ps(which) != 0; }
INLINE lanes first_lanes(int count) {
  static const int32_t bits[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)(bits + LANES - count)));
}
INLINE vec choose(lanes which, vec x, vec otherwise) { return _mm256_blendv_ps(otherwise, x, which); }
/* Lanes that are left out are not read. */
INLINE vec load_or(lanes which, const float *from, vec otherwise) {
  return choose(which, _mm256_maskload_ps(from, _mm256_castps_si256(which)), otherwise);
}
/* Not by a mask: on many a CPU that takes longer than all the rest. */
INLINE void store_first(float *to, int count, vec x) {
  if (count == LANES) {
    store(to, x);
    return;
  }
  float numbers[LANES];
  store(numbers, x);
  memcpy(to, numbers, sizeof(float) * (size_t)count);
}

INLINE ivec integers(int32_t x) { return _mm256_set1_epi32(x); }
INLINE ivec load_integers(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store_integers(void *to, ivec x) { _mm256_storeu_si256((__m256i *)to, x); }
INLINE ivec add_integers(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
INLINE ivec times_integers(ivec a, ivec b) { return _mm256_mullo_epi32(a, b); }
INLINE ivec rounded(vec x) { return _mm256_cvtps_epi32(x); }
INLINE vec floats(ivec x) { return _mm256_cvtepi32_ps(x); }
/* As uint8, the numbers beyond which become its bounds. */
INLINE void store_bytes(uint8_t *to, ivec x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}
INLINE vec load_bytes(const int8_t *from) { return floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from))); }
INLINE vec load_bfloat16(const uint16_t *from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

/* To each sum the products of four uint8 and four int8 numbers. Assembly, because GCC 12 copies the sums to and fro around
   the intrinsic, which halves the speed. */
#define ADD_DOTS(SUMS, UNSIGNED, SIGNED) \
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(SUMS) : "x"(UNSIGNED), "x"(SIGNED))

/* 8 vectors of 8 words: row i's word j goes to row j's place i. Three rounds, each of pairs of rows. */
INLINE void transpose(ivec rows[LANES]) {
  ivec half[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm256_unpacklo_epi64(half[i + j], half[i + j + 2]);
      rows[i + 2 * j + 1] = _mm256_unpackhi_epi64(half[i + j], half[i + j + 2]);
    }
  /* Here rows[4 a + b] holds, in each of its two parts c, word 4 c + b of rows 4 a to 4 a + 3. */
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    half[b] = _mm256_permute2x128_si256(rows[b], rows[4 + b], 0x20);
    half[4 + b] = _mm256_permute2x128_si256(rows[b], rows[4 + b], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i++) rows[i] = half[i];
}
