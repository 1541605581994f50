#include "products.h"

#pragma GCC target("avx512bf16")

void round_row(const float *from, int count, uint16_t *to) {
  for (int i = 0; i < count; i += LANES) _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
}

INLINE void multiply(const int count, const uint16_t *rows, ptrdiff_t stride, const weight_t *weight, int panel, vec sums[ROWS][4]) {
  const uint16_t *packed = (const uint16_t *)weight->packed + (ptrdiff_t)panel * PANEL * weight->in_features;
  vec total[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) total[r][j] = _mm512_setzero_ps();
  for (int k = 0; k < weight->in_features; k += 2) {
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

void multiply_bfloat16(int count, const uint16_t *rows, ptrdiff_t stride, const weight_t *weight, int panel, vec sums[ROWS][4]) {
  switch (count) {
    case 1: multiply(1, rows, stride, weight, panel, sums); break;
    case 2: multiply(2, rows, stride, weight, panel, sums); break;
    case 3: multiply(3, rows, stride, weight, panel, sums); break;
    case 4: multiply(4, rows, stride, weight, panel, sums); break;
    case 5: multiply(5, rows, stride, weight, panel, sums); break;
    case 6: multiply(6, rows, stride, weight, panel, sums); break;
  }
}
