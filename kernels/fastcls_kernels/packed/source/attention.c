#include "layer.h"

/* Attention of one head of one sequence: keys are turned into panels of 64, [head_dim][64], and scores of six queries
   stay in `scratch` while they become weights. */

INLINE void score(const int count, const float *query, ptrdiff_t stride, const float *panel, int head_dim, vec scale, float *scores, int ld) {
  vec sums[ROWS][VECTORS];
  EACH_ROW EACH_VECTOR sums[r][j] = zero();
  for (int d = 0; d < head_dim; d++) {
    vec key[VECTORS];
    EACH_VECTOR key[j] = load(panel + d * PANEL + LANES * j);
    EACH_ROW {
      const vec element = vec_of(query[r * stride + d]);
      EACH_VECTOR sums[r][j] = times_plus(element, key[j], sums[r][j]);
    }
  }
  EACH_ROW EACH_VECTOR store(scores + r * ld + LANES * j, times(sums[r][j], scale));
}

/* Values by their weights, so many vectors of columns at a time. */
#define MIX(SIZE)                                                                                                      \
  INLINE void mix_##SIZE(const int count, const float *weights, int ld, const float *values, ptrdiff_t stride,         \
                         int length, const float *totals, float *out, ptrdiff_t out_stride) {                          \
    vec sums[ROWS][SIZE];                                                                                              \
    EACH_ROW _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) sums[r][j] = zero();                               \
    for (int t = 0; t < length; t++) {                                                                                 \
      vec value[SIZE];                                                                                                 \
      _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) value[j] = load(values + t * stride + LANES * j);         \
      EACH_ROW {                                                                                                       \
        const vec weight = vec_of(weights[r * ld + t]);                                                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) sums[r][j] = times_plus(weight, value[j], sums[r][j]);  \
      }                                                                                                                \
    }                                                                                                                  \
    EACH_ROW _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++)                                                    \
      store(out + r * out_stride + LANES * j, times(sums[r][j], vec_of(1.0f / totals[r])));                            \
  }
#if LANES == 16
MIX(1)
MIX(4)
#endif
MIX(2)
#undef MIX

INLINE void attend_rows_of(const int count, const layer_t *layer, const float *query, ptrdiff_t query_stride, const float *panels,
                           const float *values, ptrdiff_t stride, int length, float *out, ptrdiff_t out_stride, float *scores) {
  const int ld = panels_of(length) * PANEL, head_dim = layer->head_dim;
  for (int first = 0; first < ld; first += BLOCK) {
    const float *panel = panels + (ptrdiff_t)(first / PANEL) * PANEL * head_dim + first % PANEL;
    score(count, query, query_stride, panel, head_dim, vec_of(layer->scale), scores + first, ld);
  }
  float totals[ROWS];
  for (int r = 0; r < count; r++) totals[r] = softmax_row(scores + r * ld, length);
#define TAKE(SIZE) { mix_##SIZE(count, scores, ld, values + d, stride, length, totals, out + d, out_stride); d += SIZE * LANES; }
  for (int d = 0; d < head_dim;) {
#if LANES == 16
    if (head_dim - d >= 64) TAKE(4)
    else if (head_dim - d >= 32) TAKE(2)
    else TAKE(1)
#else
    TAKE(2)
#endif
  }
#undef TAKE
}

/* One head of one sequence: some of its rows as queries. */
static void attend(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
                   const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch) {
  const int head_dim = layer->head_dim, first = head * head_dim, panels = panels_of(length);
  float *turned = scratch, *scores = scratch + (ptrdiff_t)panels * PANEL * head_dim;
  query += first, keys += first, values += first, out += first;
  for (int start = 0; start < panels * PANEL; start += LANES) {
    float *to = turned + (ptrdiff_t)(start / PANEL) * PANEL * head_dim + start % PANEL;
    for (int d = 0; d < head_dim; d += LANES) {
      ivec rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        rows[i] = start + i < length ? load_integers(keys + (ptrdiff_t)(start + i) * stride + d) : integers(0);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store_integers(to + (d + i) * PANEL, rows[i]);
    }
  }
  for (int row = 0; row < num_queries; row += ROWS) {
    const float *from = query + row * query_stride;
    float *to = out + row * out_stride;
#define TAKE(COUNT) attend_rows_of(COUNT, layer, from, query_stride, turned, values, stride, length, to, out_stride, scores);
    BY_COUNT(least(ROWS, num_queries - row), TAKE)
#undef TAKE
  }
}

/* One query row. */
static void attend_first(const layer_t *layer, const float *query, const float *keys, const float *values, ptrdiff_t stride,
                         int length, int head, float *out, float *scores) {
  const int head_dim = layer->head_dim, first = head * head_dim;
  query += first, keys += first, values += first, out += first;
  for (int t = 0; t < length; t++) {
    vec sum = zero();
    for (int d = 0; d < head_dim; d += LANES) sum = times_plus(load(query + d), load(keys + t * stride + d), sum);
    scores[t] = layer->scale * sum_of(sum);
  }
  const vec factor = vec_of(1.0f / softmax_row(scores, length));
  for (int d = 0; d < head_dim; d += LANES) {
    vec sum = zero();
    for (int t = 0; t < length; t++) sum = times_plus(vec_of(scores[t]), load(values + t * stride + d), sum);
    store(out + d, times(sum, factor));
  }
}
