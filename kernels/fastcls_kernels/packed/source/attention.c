#include "layer.h"

/* Attention of one head of one sequence: keys are turned into panels of 64, [head_dim][64], and scores of six queries
   stay in `scratch` while they become weights. */

INLINE void score(const int rows, const float *query, ptrdiff_t stride, const float *panel, int head_dim, vec scale, float *scores, int ld) {
  vec sums[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[r][j] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d++) {
    vec key[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) key[j] = load(panel + d * PANEL + LANES * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const vec element = vec_of(query[r * stride + d]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[r][j] = _mm512_fmadd_ps(element, key[j], sums[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) store(scores + r * ld + LANES * j, _mm512_mul_ps(sums[r][j], scale));
}

#define MIX(VECTORS)                                                                                                   \
  INLINE void mix_##VECTORS(const int rows, const float *weights, int ld, const float *values, ptrdiff_t stride,       \
                            int length, const float *sums_of, float *out, ptrdiff_t out_stride) {                      \
    vec sums[ROWS][VECTORS];                                                                                           \
    _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)                                                             \
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) sums[r][j] = _mm512_setzero_ps();                      \
    for (int t = 0; t < length; t++) {                                                                                 \
      vec value[VECTORS];                                                                                              \
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) value[j] = load(values + t * stride + LANES * j);      \
      _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) {                                                         \
        const vec weight = vec_of(weights[r * ld + t]);                                                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)                                                      \
          sums[r][j] = _mm512_fmadd_ps(weight, value[j], sums[r][j]);                                                  \
      }                                                                                                                \
    }                                                                                                                  \
    _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)                                                             \
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)                                                        \
        store(out + r * out_stride + LANES * j, _mm512_mul_ps(sums[r][j], vec_of(1.0f / sums_of[r])));                 \
  }
MIX(1)
MIX(2)
MIX(4)

INLINE void rows_of(const int rows, const layer_t *layer, const float *query, ptrdiff_t query_stride, const float *panels,
                    const float *values, ptrdiff_t stride, int length, float *out, ptrdiff_t out_stride, float *scores) {
  const int count = panels_of(length), ld = count * PANEL, head_dim = layer->head_dim;
  for (int panel = 0; panel < count; panel++)
    score(rows, query, query_stride, panels + (ptrdiff_t)panel * PANEL * head_dim, head_dim, vec_of(layer->scale), scores + panel * PANEL, ld);
  float sums[ROWS];
  for (int r = 0; r < rows; r++) sums[r] = softmax_row(scores + r * ld, length);
  for (int d = 0; d < head_dim;) {
    const int left = head_dim - d;
    if (left >= 64) { mix_4(rows, scores, ld, values + d, stride, length, sums, out + d, out_stride); d += 64; }
    else if (left >= 32) { mix_2(rows, scores, ld, values + d, stride, length, sums, out + d, out_stride); d += 32; }
    else { mix_1(rows, scores, ld, values + d, stride, length, sums, out + d, out_stride); d += 16; }
  }
}

void attend(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
            const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch) {
  const int head_dim = layer->head_dim, first = head * head_dim, panels = panels_of(length);
  float *turned = scratch, *scores = scratch + (ptrdiff_t)panels * PANEL * head_dim;
  query += first, keys += first, values += first, out += first;
  for (int start = 0; start < panels * PANEL; start += LANES) {
    float *to = turned + (ptrdiff_t)(start / PANEL) * PANEL * head_dim + start % PANEL;
    for (int d = 0; d < head_dim; d += LANES) {
      __m512i rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        rows[i] = start + i < length ? _mm512_loadu_si512(keys + (ptrdiff_t)(start + i) * stride + d) : _mm512_setzero_si512();
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + (d + i) * PANEL, rows[i]);
    }
  }
  int row = 0;
  for (; row + ROWS <= num_queries; row += ROWS)
    rows_of(ROWS, layer, query + row * query_stride, query_stride, turned, values, stride, length, out + row * out_stride, out_stride, scores);
  query += row * query_stride, out += row * out_stride;
  switch (num_queries - row) {
    case 1: rows_of(1, layer, query, query_stride, turned, values, stride, length, out, out_stride, scores); break;
    case 2: rows_of(2, layer, query, query_stride, turned, values, stride, length, out, out_stride, scores); break;
    case 3: rows_of(3, layer, query, query_stride, turned, values, stride, length, out, out_stride, scores); break;
    case 4: rows_of(4, layer, query, query_stride, turned, values, stride, length, out, out_stride, scores); break;
    case 5: rows_of(5, layer, query, query_stride, turned, values, stride, length, out, out_stride, scores); break;
  }
}

void attend_first(const layer_t *layer, const float *query, const float *keys, const float *values, ptrdiff_t stride,
                  int length, int head, float *out, float *scores) {
  const int head_dim = layer->head_dim, first = head * head_dim;
  query += first, keys += first, values += first, out += first;
  for (int t = 0; t < length; t++) {
    vec sum = _mm512_setzero_ps();
    for (int d = 0; d < head_dim; d += LANES) sum = _mm512_fmadd_ps(load(query + d), load(keys + t * stride + d), sum);
    scores[t] = layer->scale * _mm512_reduce_add_ps(sum);
  }
  const vec factor = vec_of(1.0f / softmax_row(scores, length));
  for (int d = 0; d < head_dim; d += LANES) {
    vec sum = _mm512_setzero_ps();
    for (int t = 0; t < length; t++) sum = _mm512_fmadd_ps(vec_of(scores[t]), load(values + t * stride + d), sum);
    store(out + d, _mm512_mul_ps(sum, factor));
  }
}
