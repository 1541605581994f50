#include "products.h"

#if HAS_BFLOAT16
/* In bfloat16.c, since they need another instruction set. */
static void round_row(const float *from, int count, uint16_t *to);
static void block_bfloat16(const weight_t *weight, const rows_t *rows, int row, int count, int first, const char *ahead, const result_t *result, float *tile);
#endif

/* Rows that share a pass over the weight. */
#define CHUNK 192
/* Columns of float32 rows that are multiplied at a time. */
#define STEPS 384

static void quantise_group(const float *from, int count, uint8_t *values, float *scale, int32_t *zero_point) {
  vec x[GROUP / LANES];
  vec low = zero(), high = zero();
  lanes unordered = nan_lanes(zero());
  const int vectors = count / LANES;
  for (int i = 0; i < vectors; i++) {
    x[i] = load(from + LANES * i);
    low = smaller(low, x[i]);
    high = larger(high, x[i]);
    unordered = either(unordered, nan_lanes(x[i]));
  }
  const float smallest = lowest_of(low), range = highest_of(high) - smallest;
  if (any(unordered) || !(range <= 3.4e38f)) {
    /* NaN or infinity: whatever is made of the row becomes NaN. */
    *scale = NAN;
    *zero_point = 0;
    memset(values, 0, (size_t)count);
    return;
  }
  const float step = range > 1e-30f ? range / 255.0f : 1.0f, inverse = 1.0f / step;
  const int32_t shift = (int32_t)lrintf(-smallest * inverse);
  *scale = step;
  *zero_point = shift;
  for (int i = 0; i < vectors; i++)
    store_bytes(values + LANES * i, add_integers(rounded(times(x[i], vec_of(inverse))), integers(shift)));
}

/* Columns from `start` on, at most a group of them, of one row. */
INLINE void read_group(enum kind kind, const float *from, int row, int start, rows_t *to) {
  const int count = least(GROUP, to->width - start);
  const ptrdiff_t place = (ptrdiff_t)row * to->groups + start / GROUP;
  if (kind == INT8)
    quantise_group(from, count, (uint8_t *)to->values + row * to->stride + start, to->scales + place, to->zero_points + place);
#if HAS_BFLOAT16
  else
    round_row(from, count, (uint16_t *)to->values + row * to->stride + start);
#endif
}

/* Float32 rows to rows of a kind. */
static void read_rows(enum kind kind, const float *x, ptrdiff_t stride, int count, rows_t *to, int threads) {
  if (kind == FLOAT32) {
    to->values = (void *)x;
    to->stride = stride;
    return;
  }
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int row = 0; row < count; row++)
    for (int start = 0; start < to->width; start += GROUP) read_group(kind, x + row * stride + start, row, start, to);
}

INLINE void multiply_int8(const int count, const rows_t *rows, int row, const weight_t *weight, int first, const char *ahead, vec sums[ROWS][VECTORS]) {
  const int width = rows->width;
  const uint8_t *values = (const uint8_t *)rows->values + row * rows->stride;
  const int8_t *packed = (const int8_t *)weight->packed + (ptrdiff_t)(first / PANEL) * PANEL * width + 4 * (first % PANEL);
  EACH_ROW EACH_VECTOR sums[r][j] = zero();
  for (int group = 0; group < rows->groups; group++) {
    const int start = group * GROUP, steps = least(GROUP, width - start) / 4;
    const ptrdiff_t place = (ptrdiff_t)row * rows->groups + group;
    const int32_t *column_sums = weight->sums + (ptrdiff_t)group * weight->sums_stride + first;
    ivec whole[ROWS][VECTORS];
    EACH_ROW {
      const ivec shift = integers(-rows->zero_points[place + r * rows->groups]);
      EACH_VECTOR whole[r][j] = times_integers(shift, load_integers(column_sums + LANES * j));
    }
    for (int step = 0; step < steps; step++) {
      if (ahead) _mm_prefetch(ahead + (ptrdiff_t)(start / 4 + step) * 64, _MM_HINT_T1);
      ivec column[VECTORS];
      EACH_VECTOR column[j] = load_integers(packed + ((ptrdiff_t)start + 4 * step) * PANEL + 4 * LANES * j);
      EACH_ROW {
        int32_t four;
        memcpy(&four, values + r * rows->stride + start + 4 * step, 4);
        const ivec element = integers(four);
        EACH_VECTOR ADD_DOTS(whole[r][j], element, column[j]);
      }
    }
    EACH_ROW {
      const vec scale = vec_of(rows->scales[place + r * rows->groups]);
      EACH_VECTOR sums[r][j] = times_plus(floats(whole[r][j]), scale, sums[r][j]);
    }
  }
  EACH_VECTOR {
    const vec scale = load(weight->scales + first + LANES * j);
    EACH_ROW sums[r][j] = times(sums[r][j], scale);
  }
}

/* Of float32 some steps at a time, behind `partial`, the sums of the steps before: so many of a panel stay in the cache. */
INLINE void multiply_float32(const int count, const rows_t *rows, int row, const weight_t *weight, int first, int begin, int end, const float *partial, const char *ahead, vec sums[ROWS][VECTORS]) {
  const float *packed = (const float *)weight->packed + ((ptrdiff_t)(first / PANEL) * weight->in_features + begin) * PANEL + first % PANEL;
  const float *x = (const float *)rows->values + row * rows->stride + begin;
  vec total[ROWS][VECTORS];
  EACH_ROW EACH_VECTOR total[r][j] = begin ? load(partial + r * PANEL + LANES * j) : zero();
  for (int k = 0; k < end - begin; k++) {
    if (ahead) _mm_prefetch(ahead + (ptrdiff_t)k * 64, _MM_HINT_T1);
    vec column[VECTORS];
    EACH_VECTOR column[j] = load(packed + (ptrdiff_t)k * PANEL + LANES * j);
    EACH_ROW {
      const vec element = vec_of(x[r * rows->stride + k]);
      EACH_VECTOR total[r][j] = times_plus(element, column[j], total[r][j]);
    }
  }
  EACH_ROW EACH_VECTOR sums[r][j] = total[r][j];
}

/* A step of a panel is four lines of the cache. Each of the first four blocks of rows fetches one line of each step of
   what comes next, so that it is there when its turn comes: from memory it takes as long as its products. */
INLINE const char *ahead_of(const weight_t *weight, int panel, int begin, int end, int block) {
  if (block >= 4) return NULL;
  const ptrdiff_t step = weight->kind == INT8 ? 1 : weight->kind == BFLOAT16 ? 2 : 4;
  const ptrdiff_t row = step * PANEL, here = ((ptrdiff_t)panel * weight->in_features + end) * row;
  return (const char *)weight->packed + here + block * ((end - begin) * row / 4);
}

/* All columns of a panel, for some rows. */
static void panel_float32(const weight_t *weight, const rows_t *rows, int from, int last, int panel, const result_t *result) {
  float partials[CHUNK * PANEL] __attribute__((aligned(64)));
  for (int begin = 0; begin < weight->in_features; begin += STEPS) {
    const int end = least(begin + STEPS, weight->in_features);
    for (int row = from; row < last; row += ROWS)
      for (int part = 0; part < PANEL; part += BLOCK) {
        const int first = panel * PANEL + part;
        float *partial = partials + (row - from) * PANEL + part;
        const char *ahead = part ? NULL : ahead_of(weight, panel, begin, end, (row - from) / ROWS);
#define TAKE(COUNT)                                                                          \
  {                                                                                          \
    const int count = COUNT;                                                                 \
    vec sums[ROWS][VECTORS];                                                                 \
    multiply_float32(count, rows, row, weight, first, begin, end, partial, ahead, sums);     \
    if (end == weight->in_features)                                                          \
      finish(count, 1, sums, weight, first, row, result, NULL);                              \
    else                                                                                     \
      EACH_ROW EACH_VECTOR store(partial + r * PANEL + LANES * j, sums[r][j]);               \
  }
        BY_COUNT(least(ROWS, last - row), TAKE)
#undef TAKE
      }
  }
}

static void block_int8(const weight_t *weight, const rows_t *rows, int row, int count, int first, const char *ahead, const result_t *result, float *tile) {
#define TAKE(COUNT)                                                  \
  {                                                                  \
    vec sums[ROWS][VECTORS];                                         \
    multiply_int8(COUNT, rows, row, weight, first, ahead, sums);     \
    finish(COUNT, 0, sums, weight, first, row, result, tile);        \
  }
  BY_COUNT(count, TAKE)
#undef TAKE
}

/* Of int8 and bfloat16 a block of rows takes two panels, one group of the next product's rows. */
static void pair_of_panels(const weight_t *weight, const rows_t *rows, int from, int last, int pair, const result_t *result) {
  float tile[ROWS * GROUP] __attribute__((aligned(64)));
  const int end = least(2 * pair + 2, panels_of(weight->out_features));
  for (int row = from; row < last; row += ROWS) {
    const int count = least(ROWS, last - row);
    for (int first = 2 * pair * PANEL; first < end * PANEL; first += BLOCK) {
      const char *ahead = first % PANEL ? NULL : ahead_of(weight, first / PANEL, 0, weight->in_features, (row - from) / ROWS);
#if HAS_BFLOAT16
      if (weight->kind == BFLOAT16) {
        block_bfloat16(weight, rows, row, count, first, ahead, result, result->rows ? tile : NULL);
        continue;
      }
#endif
      block_int8(weight, rows, row, count, first, ahead, result, result->rows ? tile : NULL);
    }
    for (int r = 0; result->rows && r < count; r++) read_group(weight->kind, tile + r * GROUP, row + r, pair * GROUP, result->rows);
  }
}

static void product(const weight_t *weight, const rows_t *rows, int count, const result_t *result, int threads) {
  const int columns = weight->kind == FLOAT32 ? panels_of(weight->out_features) : groups_of(weight->out_features);
  const int chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int item = 0; item < chunks * columns; item++) {
    const int from = item / columns * CHUNK, last = least(from + CHUNK, count);
    if (weight->kind == FLOAT32)
      panel_float32(weight, rows, from, last, item % columns, result);
    else
      pair_of_panels(weight, rows, from, last, item % columns, result);
  }
}
