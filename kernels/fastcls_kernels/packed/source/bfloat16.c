#include "layer.h"

/* Products and attention in bfloat16, summed in float32. */
#pragma GCC target("avx512bf16")

static void round_row(const float *from, int count, uint16_t *to) {
  for (int i = 0; i < count; i += LANES) _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
}

/* Assembly for the same reason as ADD_DOTS. */
#define ADD_PAIRS(SUMS, PAIRS, COLUMN) __asm__("vdpbf16ps %2, %1, %0" : "+v"(SUMS) : "v"(PAIRS), "v"(COLUMN))

/* A pair of numbers in all lanes. */
INLINE ivec pair_at(const uint16_t *from) {
  int32_t two;
  memcpy(&two, from, 4);
  return integers(two);
}

INLINE void multiply_bfloat16(const int count, const rows_t *rows, int row, const weight_t *weight, int first, const char *ahead, vec sums[ROWS][VECTORS]) {
  const uint16_t *packed = (const uint16_t *)weight->packed + (ptrdiff_t)(first / PANEL) * PANEL * weight->in_features;
  const uint16_t *x = (const uint16_t *)rows->values + row * rows->stride;
  vec total[ROWS][VECTORS];
  EACH_ROW EACH_VECTOR total[r][j] = zero();
  for (int k = 0; k < weight->in_features; k += 2) {
    if (ahead) _mm_prefetch(ahead + (ptrdiff_t)k * 32, _MM_HINT_T1);
    ivec column[VECTORS];
    EACH_VECTOR column[j] = load_integers(packed + (ptrdiff_t)k * PANEL + 2 * LANES * j);
    EACH_ROW {
      const ivec pair = pair_at(x + r * rows->stride + k);
      EACH_VECTOR ADD_PAIRS(total[r][j], pair, column[j]);
    }
  }
  EACH_ROW EACH_VECTOR sums[r][j] = total[r][j];
}

static void block_bfloat16(const weight_t *weight, const rows_t *rows, int row, int count, int first, const char *ahead, const result_t *result, float *tile) {
#define TAKE(COUNT)                                                  \
  {                                                                  \
    vec sums[ROWS][VECTORS];                                         \
    multiply_bfloat16(COUNT, rows, row, weight, first, ahead, sums); \
    finish(COUNT, 0, sums, weight, first, row, result, tile);        \
  }
  BY_COUNT(count, TAKE)
#undef TAKE
}

/* Two vectors of float32 as pairs of bfloat16: the first one's number, then the second one's. */
INLINE ivec pairs_of(vec first, vec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (ivec)_mm512_cvtne2ps_pbh(second, first));
}

/* rows times columns: [count][steps] pairs by [steps][stride] vectors of pairs. */
#define DOTS(SIZE)                                                                                                     \
  INLINE void dots_##SIZE(const int count, const uint16_t *rows, ptrdiff_t row_stride, const uint16_t *columns,        \
                          ptrdiff_t column_stride, int steps, vec sums[ROWS][SIZE]) {                                  \
    EACH_ROW _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) sums[r][j] = zero();                               \
    for (int step = 0; step < steps; step++) {                                                                         \
      ivec column[SIZE];                                                                                               \
      _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) column[j] =                                               \
          load_integers(columns + step * column_stride + 2 * LANES * j);                                               \
      EACH_ROW {                                                                                                       \
        const ivec pair = pair_at(rows + r * row_stride + 2 * step);                                                   \
        _Pragma("GCC unroll 4") for (int j = 0; j < SIZE; j++) ADD_PAIRS(sums[r][j], pair, column[j]);                 \
      }                                                                                                                \
    }                                                                                                                  \
  }
DOTS(1)
DOTS(2)
DOTS(4)
#undef DOTS

#define MIX(SIZE)                                                                                                      \
  {                                                                                                                    \
    vec sums[ROWS][SIZE];                                                                                              \
    dots_##SIZE(count, weights, ld, values + 2 * d, 2 * head_dim, (length + 1) / 2, sums);                             \
    for (int r = 0; r < count; r++)                                                                                    \
      for (int j = 0; j < SIZE; j++) store(out + r * out_stride + d + LANES * j, times(sums[r][j], vec_of(1.0f / totals[r]))); \
    d += LANES * SIZE;                                                                                                 \
  }

INLINE void attend_block(const int count, const layer_t *layer, const uint16_t *query, const uint16_t *keys, const uint16_t *values,
                         int length, float *scores, uint16_t *weights, float *out, ptrdiff_t out_stride) {
  const int panels = panels_of(length), ld = panels * PANEL, head_dim = layer->head_dim;
  for (int panel = 0; panel < panels; panel++) {
    vec sums[ROWS][VECTORS];
    dots_4(count, query, head_dim, keys + (ptrdiff_t)panel * PANEL * head_dim, 2 * PANEL, head_dim / 2, sums);
    EACH_ROW EACH_VECTOR store(scores + r * ld + panel * PANEL + LANES * j, times(sums[r][j], vec_of(layer->scale)));
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
#undef MIX

/* As `attend`. */
static void attend_bfloat16(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
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
      ivec rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const float *from = keys + (ptrdiff_t)(start + i) * stride + d;
        const vec low = start + i < length ? load(from) : zero();
        const vec high = start + i < length && is_whole ? load(from + LANES) : zero();
        rows[i] = (ivec)_mm512_cvtne2ps_pbh(high, low);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        if (i < LANES / 2 || is_whole) store_integers(to + (d + 2 * i) * PANEL, rows[i]);
    }
  }
  for (int t = 0; t < length; t += 2)
    for (int d = 0; d < head_dim; d += LANES) {
      const float *from = values + t * stride + d;
      const vec next = t + 1 < length ? load(from + stride) : zero();
      store_integers(paired + (ptrdiff_t)t * head_dim + 2 * d, pairs_of(load(from), next));
    }
  for (int row = 0; row < num_queries; row += ROWS) {
    const int count = least(ROWS, num_queries - row);
    for (int r = 0; r < count; r++) round_row(query + (row + r) * query_stride, head_dim, rounded + r * head_dim);
    float *to = out + row * out_stride;
#define TAKE(COUNT) attend_block(COUNT, layer, rounded, turned, paired, length, scores, weights, to, out_stride);
    BY_COUNT(count, TAKE)
#undef TAKE
  }
}
