#include "layer.h"

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

/* Two vectors of float32 as pairs of bfloat16: the first one's number, then the second one's. */
INLINE __m512i pairs_of(vec first, vec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* rows times columns: [count][steps] pairs by [steps][stride] vectors of pairs. */
#define DOTS(VECTORS)                                                                                                    \
  INLINE void dots_##VECTORS(const int count, const uint16_t *rows, ptrdiff_t row_stride, const uint16_t *columns,      \
                             ptrdiff_t column_stride, int steps, vec sums[ROWS][VECTORS]) {                             \
    _Pragma("GCC unroll 6") for (int r = 0; r < count; r++)                                                              \
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) sums[r][j] = _mm512_setzero_ps();                        \
    for (int step = 0; step < steps; step++) {                                                                           \
      __m512i column[VECTORS];                                                                                           \
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) column[j] =                                              \
          _mm512_loadu_si512(columns + step * column_stride + 2 * LANES * j);                                            \
      _Pragma("GCC unroll 6") for (int r = 0; r < count; r++) {                                                          \
        int32_t two;                                                                                                     \
        memcpy(&two, rows + r * row_stride + 2 * step, 4);                                                               \
        const __m512i element = _mm512_set1_epi32(two);                                                                  \
        _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)                                                        \
          __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[r][j]) : "v"(element), "v"(column[j]));                             \
      }                                                                                                                  \
    }                                                                                                                    \
  }
DOTS(1)
DOTS(2)
DOTS(4)

#define MIX(VECTORS)                                                                                                     \
  {                                                                                                                      \
    vec sums[ROWS][VECTORS];                                                                                             \
    dots_##VECTORS(count, weights, ld, values + 2 * d, 2 * head_dim, (length + 1) / 2, sums);                            \
    for (int r = 0; r < count; r++)                                                                                      \
      for (int j = 0; j < VECTORS; j++)                                                                                  \
        store(out + r * out_stride + d + LANES * j, _mm512_mul_ps(sums[r][j], vec_of(1.0f / totals[r])));                \
    d += LANES * VECTORS;                                                                                                \
  }

INLINE void attend_block(const int count, const layer_t *layer, const uint16_t *query, const uint16_t *keys, const uint16_t *values,
                         int length, float *scores, uint16_t *weights, float *out, ptrdiff_t out_stride) {
  const int panels = panels_of(length), ld = panels * PANEL, head_dim = layer->head_dim;
  for (int panel = 0; panel < panels; panel++) {
    vec sums[ROWS][4];
    dots_4(count, query, head_dim, keys + (ptrdiff_t)panel * PANEL * head_dim, 2 * PANEL, head_dim / 2, sums);
    for (int r = 0; r < count; r++)
      for (int j = 0; j < 4; j++) store(scores + r * ld + panel * PANEL + LANES * j, _mm512_mul_ps(sums[r][j], vec_of(layer->scale)));
  }
  float totals[ROWS];
  for (int r = 0; r < count; r++) {
    totals[r] = softmax_row(scores + r * ld, length);
    /* Whole vectors: lanes behind the length are zero. */
    round_row(scores + r * ld, (length + LANES - 1) / LANES * LANES, weights + r * ld);
  }
  for (int d = 0; d < head_dim;) {
    if (head_dim - d >= 64) MIX(4)
    else if (head_dim - d >= 32) MIX(2)
    else MIX(1)
  }
}

void attend_bfloat16(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
                     const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch) {
  const int head_dim = layer->head_dim, first = head * head_dim, panels = panels_of(length);
  const ptrdiff_t size = (ptrdiff_t)panels * PANEL;
  float *scores = scratch;
  uint16_t *turned = (uint16_t *)(scores + ROWS * size), *paired = turned + size * head_dim;
  uint16_t *weights = paired + size * head_dim, *rounded = weights + ROWS * size;
  query += first, keys += first, values += first, out += first;
  /* Keys as [panels][head_dim / 2][64][2], values as [length / 2][head_dim][2]. */
  for (int start = 0; start < size; start += LANES) {
    uint16_t *to = turned + (ptrdiff_t)(start / PANEL) * PANEL * head_dim + 2 * (start % PANEL);
    for (int d = 0; d < head_dim; d += 2 * LANES) {
      const int is_whole = d + LANES < head_dim;
      __m512i rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const float *from = keys + (ptrdiff_t)(start + i) * stride + d;
        const vec low = start + i < length ? load(from) : _mm512_setzero_ps();
        const vec high = start + i < length && is_whole ? load(from + LANES) : _mm512_setzero_ps();
        rows[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        if (i < LANES / 2 || is_whole) _mm512_storeu_si512(to + (d + 2 * i) * PANEL, rows[i]);
    }
  }
  for (int t = 0; t < length; t += 2)
    for (int d = 0; d < head_dim; d += LANES) {
      const float *from = values + t * stride + d;
      const vec next = t + 1 < length ? load(from + stride) : _mm512_setzero_ps();
      _mm512_storeu_si512(paired + (ptrdiff_t)t * head_dim + 2 * d, pairs_of(load(from), next));
    }
  for (int row = 0; row < num_queries; row += ROWS) {
    const int count = least(ROWS, num_queries - row);
    for (int r = 0; r < count; r++) round_row(query + (row + r) * query_stride, head_dim, rounded + r * head_dim);
    float *to = out + row * out_stride;
    switch (count) {
      case 1: attend_block(1, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
      case 2: attend_block(2, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
      case 3: attend_block(3, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
      case 4: attend_block(4, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
      case 5: attend_block(5, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
      case 6: attend_block(6, layer, rounded, turned, paired, length, scores, weights, to, out_stride); break;
    }
  }
}
