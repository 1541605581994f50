#include "products.h"

#pragma GCC target("avx512bf16")

void round_row(const float *from, int count, uint16_t *to) {
  for (int i = 0; i < count; i += LANES) _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
}

INLINE void multiply(const int count, const uint16_t *rows, ptrdiff_t stride, const weight_t *weight, int panel, const char *ahead, vec sums[ROWS][4]) {
  const uint16_t *packed = (const uint16_t *)weight->packed + (ptrdiff_t)panel * PANEL * weight->in_features;
  vec total[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) total[r][j] = _mm512_setzero_ps();
  for (int k = 0; k < weight->in_features; k += 2) {
    if (ahead) _mm_prefetch(ahead + (ptrdiff_t)k * 32, _MM_HINT_T1);
    __m512i column[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) column[j] = _mm512_loadu_si512(packed + (ptrdiff_t)k * PANEL + 2 * LANES * j);
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
      int32_t two;
      memcpy(&two, rows + r * stride + k, 4);
      const __m512i element = _mm512_set1_epi32(two);
      /* Assembly for the same reason as in products.c. */
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) __asm__("vdpbf16ps %2, %1, %0" : "+v"(total[r][j]) : "v"(element), "v"(column[j]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[r][j] = total[r][j];
}

#define TAKE(COUNT)                                                                                                      \
  case COUNT: {                                                                                                          \
    vec sums[ROWS][4];                                                                                                   \
    multiply(COUNT, (const uint16_t *)rows->values + row * rows->stride, rows->stride, weight, panel, ahead, sums);      \
    finish(COUNT, 0, sums, weight, panel, row, result, tile);                                                            \
    break;                                                                                                               \
  }

void block_bfloat16(const weight_t *weight, const rows_t *rows, int row, int count, int panel, const char *ahead, const result_t *result, float *tile) {
  switch (count) {
    TAKE(1)
    TAKE(2)
    TAKE(3)
    TAKE(4)
    TAKE(5)
    TAKE(6)
  }
}
