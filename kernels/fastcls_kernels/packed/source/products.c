#include "products.h"

/* Rows that share a pass over the weight. */
#define CHUNK 192
/* Columns of float32 rows that are multiplied at a time. */
#define STEPS 384

static void quantise_group(const float *from, int count, uint8_t *values, float *scale, int32_t *zero_point) {
  vec x[GROUP / LANES];
  vec low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  const int vectors = count / LANES;
  for (int i = 0; i < vectors; i++) {
    x[i] = load(from + LANES * i);
    low = _mm512_min_ps(low, x[i]);
    high = _mm512_max_ps(high, x[i]);
    unordered |= _mm512_cmp_ps_mask(x[i], x[i], _CMP_UNORD_Q);
  }
  const float smallest = _mm512_reduce_min_ps(low), range = _mm512_reduce_max_ps(high) - smallest;
  if (unordered || !(range <= 3.4e38f)) {
    /* NaN or infinity: whatever is made of the row becomes NaN. */
    *scale = NAN;
    *zero_point = 0;
    memset(values, 0, (size_t)count);
    return;
  }
  const float step = range > 1e-30f ? range / 255.0f : 1.0f, inverse = 1.0f / step;
  const int32_t zero = (int32_t)lrintf(-smallest * inverse);
  *scale = step;
  *zero_point = zero;
  const __m512i shift = _mm512_set1_epi32(zero);
  for (int i = 0; i < vectors; i++) {
    const __m512i near = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], vec_of(inverse))), shift);
    _mm_storeu_si128((__m128i *)(values + LANES * i), _mm512_cvtusepi32_epi8(_mm512_max_epi32(near, _mm512_setzero_si512())));
  }
}

/* Columns from `start` on, at most a group of them, of one row. */
INLINE void read_group(enum kind kind, const float *from, int row, int start, rows_t *to) {
  const int count = least(GROUP, to->width - start);
  const ptrdiff_t place = (ptrdiff_t)row * to->groups + start / GROUP;
  if (kind == INT8)
    quantise_group(from, count, (uint8_t *)to->values + row * to->stride + start, to->scales + place, to->zero_points + place);
  else
    round_row(from, count, (uint16_t *)to->values + row * to->stride + start);
}

void read_rows(enum kind kind, const float *x, ptrdiff_t stride, int count, rows_t *to, int threads) {
  if (kind == FLOAT32) {
    to->values = (void *)x;
    to->stride = stride;
    return;
  }
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int row = 0; row < count; row++)
    for (int start = 0; start < to->width; start += GROUP) read_group(kind, x + row * stride + start, row, start, to);
}

INLINE void multiply_int8(const int count, const rows_t *rows, int row, const weight_t *weight, int panel, const char *ahead, vec sums[ROWS][4]) {
  const int width = rows->width;
  const uint8_t *values = (const uint8_t *)rows->values + row * rows->stride;
  const int8_t *packed = (const int8_t *)weight->packed + (ptrdiff_t)panel * PANEL * width;
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[r][j] = _mm512_setzero_ps();
  for (int group = 0; group < rows->groups; group++) {
    const int start = group * GROUP, steps = least(GROUP, width - start) / 4;
    const ptrdiff_t place = (ptrdiff_t)row * rows->groups + group;
    const int32_t *column_sums = weight->sums + (ptrdiff_t)group * weight->sums_stride + panel * PANEL;
    __m512i whole[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
      const __m512i zero = _mm512_set1_epi32(-rows->zero_points[place + r * rows->groups]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) whole[r][j] = _mm512_mullo_epi32(zero, _mm512_loadu_si512(column_sums + LANES * j));
    }
    for (int step = 0; step < steps; step++) {
      if (ahead) _mm_prefetch(ahead + (ptrdiff_t)(start / 4 + step) * 64, _MM_HINT_T1);
      __m512i column[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) column[j] = _mm512_loadu_si512(packed + ((ptrdiff_t)start + 4 * step) * PANEL + PANEL * j);
#pragma GCC unroll 6
      for (int r = 0; r < count; r++) {
        int32_t four;
        memcpy(&four, values + r * rows->stride + start + 4 * step, 4);
        const __m512i element = _mm512_set1_epi32(four);
        /* Assembly, because GCC 12 copies the sums to and fro around the intrinsic, which halves the speed. */
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) __asm__("vpdpbusd %2, %1, %0" : "+v"(whole[r][j]) : "v"(element), "v"(column[j]));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
      const vec scale = vec_of(rows->scales[place + r * rows->groups]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][j]), scale, sums[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const vec scale = load(weight->scales + panel * PANEL + LANES * j);
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) sums[r][j] = _mm512_mul_ps(sums[r][j], scale);
  }
}

/* Of float32 some steps at a time, behind `partial`, the sums of the steps before: so many of a panel stay in the cache. */
INLINE void multiply_float32(const int count, const rows_t *rows, int row, const weight_t *weight, int panel, int begin, int end, const float *partial, const char *ahead, vec sums[ROWS][4]) {
  const float *packed = (const float *)weight->packed + ((ptrdiff_t)panel * weight->in_features + begin) * PANEL;
  const float *x = (const float *)rows->values + row * rows->stride + begin;
  vec total[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) total[r][j] = begin ? load(partial + r * PANEL + LANES * j) : _mm512_setzero_ps();
  for (int k = 0; k < end - begin; k++) {
    if (ahead) _mm_prefetch(ahead + (ptrdiff_t)k * 64, _MM_HINT_T1);
    vec column[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) column[j] = load(packed + (ptrdiff_t)k * PANEL + LANES * j);
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
      const vec element = vec_of(x[r * rows->stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) total[r][j] = _mm512_fmadd_ps(element, column[j], total[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[r][j] = total[r][j];
}

/* A step of a panel is four lines of the cache. Each of the first four blocks of rows fetches one line of each step of
   what comes next, so that it is there when its turn comes: from memory it takes as long as its products. */
INLINE const char *ahead_of(const weight_t *weight, int panel, int begin, int end, int block) {
  if (block >= 4) return NULL;
  const ptrdiff_t step = weight->kind == INT8 ? 1 : weight->kind == BFLOAT16 ? 2 : 4;
  const ptrdiff_t row = step * PANEL, here = ((ptrdiff_t)panel * weight->in_features + end) * row;
  return (const char *)weight->packed + here + block * ((end - begin) * row / 4);
}

#define TAKE_FLOAT32(COUNT)                                                                                    \
  case COUNT: {                                                                                                \
    vec sums[ROWS][4];                                                                                         \
    multiply_float32(COUNT, rows, row, weight, panel, begin, end, partial, ahead, sums);                       \
    if (end == weight->in_features)                                                                            \
      finish(COUNT, 1, sums, weight, panel, row, result, NULL);                                                \
    else                                                                                                       \
      for (int r = 0; r < COUNT; r++)                                                                          \
        for (int j = 0; j < 4; j++) store(partial + r * PANEL + LANES * j, sums[r][j]);                        \
    break;                                                                                                     \
  }

/* All columns of a panel, for some rows. */
static void panel_float32(const weight_t *weight, const rows_t *rows, int first, int last, int panel, const result_t *result) {
  float partials[CHUNK * PANEL] __attribute__((aligned(64)));
  for (int begin = 0; begin < weight->in_features; begin += STEPS) {
    const int end = least(begin + STEPS, weight->in_features);
    for (int row = first; row < last; row += ROWS) {
      float *partial = partials + (row - first) * PANEL;
      const char *ahead = ahead_of(weight, panel, begin, end, (row - first) / ROWS);
      switch (least(ROWS, last - row)) {
        TAKE_FLOAT32(1)
        TAKE_FLOAT32(2)
        TAKE_FLOAT32(3)
        TAKE_FLOAT32(4)
        TAKE_FLOAT32(5)
        TAKE_FLOAT32(6)
      }
    }
  }
}

#define TAKE(COUNT)                                                      \
  case COUNT: {                                                          \
    vec sums[ROWS][4];                                                   \
    multiply_int8(COUNT, rows, row, weight, panel, ahead, sums);         \
    finish(COUNT, 0, sums, weight, panel, row, result, tile);            \
    break;                                                               \
  }

static void block_int8(const weight_t *weight, const rows_t *rows, int row, int count, int panel, const char *ahead, const result_t *result, float *tile) {
  switch (count) {
    TAKE(1)
    TAKE(2)
    TAKE(3)
    TAKE(4)
    TAKE(5)
    TAKE(6)
  }
}

/* Of int8 and bfloat16 a block of rows takes two panels, one group of the next product's rows. */
static void pair_of_panels(const weight_t *weight, const rows_t *rows, int first, int last, int pair, const result_t *result) {
  float tile[ROWS * GROUP] __attribute__((aligned(64)));
  const int end = least(2 * pair + 2, panels_of(weight->out_features));
  for (int row = first; row < last; row += ROWS) {
    const int count = least(ROWS, last - row);
    for (int panel = 2 * pair; panel < end; panel++) {
      const char *ahead = ahead_of(weight, panel, 0, weight->in_features, (row - first) / ROWS);
      (weight->kind == INT8 ? block_int8 : block_bfloat16)(weight, rows, row, count, panel, ahead, result, result->rows ? tile : NULL);
    }
    for (int r = 0; result->rows && r < count; r++) read_group(weight->kind, tile + r * GROUP, row + r, pair * GROUP, result->rows);
  }
}

void product(const weight_t *weight, const rows_t *rows, int count, const result_t *result, int threads) {
  const int columns = weight->kind == FLOAT32 ? panels_of(weight->out_features) : groups_of(weight->out_features);
  const int chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int item = 0; item < chunks * columns; item++) {
    const int first = item / columns * CHUNK, last = least(first + CHUNK, count);
    if (weight->kind == FLOAT32)
      panel_float32(weight, rows, first, last, item % columns, result);
    else
      pair_of_panels(weight, rows, first, last, item % columns, result);
  }
}
