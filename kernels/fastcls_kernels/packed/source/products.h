/* Products with a weight that was packed once: out = f(x weight^T + bias) + residual.

   A packed weight is a row of panels of 64 output columns, the last one filled up with zeros. Rows are taken six at a
   time: six rows by four vectors of sums leave room in the 32 registers for the four vectors of one step of the weight.
   A row's sums are added up in the same order whatever else is computed, so its bits depend on that row alone. */
#ifndef FASTCLS_PRODUCTS_H
#define FASTCLS_PRODUCTS_H

#include "vectors.h"

#define PANEL 64
#define ROWS 6
/* Columns of a row of uint8 numbers that share a scale and a zero point. */
#define GROUP 128

enum kind { FLOAT32, BFLOAT16, INT8 };

typedef struct {
  int32_t kind, in_features, out_features, sums_stride;
  const void *packed;  /* [panels][in_features][64] float32, [..][in_features / 2][64][2] bfloat16, or [..][in_features / 4][64][4] int8 */
  const float *bias;   /* [panels * 64] */
  const float *scales; /* [panels * 64], of INT8 */
  const int32_t *sums; /* [groups][sums_stride], of INT8: the sum of each column's weights within a group */
} weight_t;

/* Rows as a product reads them. Of INT8, x = scale * (value - zero_point) for each row and group of 128 columns. */
typedef struct {
  void *values;         /* [rows][stride]: float32, bfloat16 or uint8 */
  ptrdiff_t stride;
  float *scales;        /* [rows][groups], of INT8 */
  int32_t *zero_points; /* [rows][groups], of INT8 */
  int32_t width, groups;
} rows_t;

typedef struct {
  enum activation function;
  const float *residual; /* [rows][residual_stride], or NULL */
  ptrdiff_t residual_stride;
  float *out;            /* [rows][out_stride], or NULL where `rows` takes the result */
  ptrdiff_t out_stride;
  rows_t *rows;          /* the result as the next product of the same kind reads it */
} result_t;

INLINE int groups_of(int width) { return (width + GROUP - 1) / GROUP; }
INLINE int panels_of(int columns) { return (columns + PANEL - 1) / PANEL; }
INLINE int least(int a, int b) { return a < b ? a : b; }

/* Float32 rows to rows of a kind. */
void read_rows(enum kind kind, const float *x, ptrdiff_t stride, int count, rows_t *to, int threads);
void product(const weight_t *weight, const rows_t *rows, int count, const result_t *result, int threads);

/* Of BFLOAT16, in a file of their own, since they need another instruction set. */
void round_row(const float *from, int count, uint16_t *to);
void block_bfloat16(const weight_t *weight, const rows_t *rows, int row, int count, int panel, const char *ahead, const result_t *result, float *tile);

/* Sums to results, for the columns of one panel: to memory, or to a `tile` of two panels. */
INLINE void finish(const int count, const int is_exact, vec sums[ROWS][4], const weight_t *weight, int panel, int row, const result_t *result, float *tile) {
  const int first = panel * PANEL, columns = weight->out_features - first;
  for (int j = 0; j < 4 && LANES * j < columns; j++) {
    const int at = first + LANES * j;
    const __mmask16 there = columns - LANES * j < LANES ? first_lanes(columns - LANES * j) : 0xffff;
    const vec bias = load(weight->bias + at);
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
      vec x = activate(result->function, is_exact, _mm512_add_ps(sums[r][j], bias));
      if (result->residual)
        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(there, result->residual + (row + r) * result->residual_stride + at));
      if (tile)
        store(tile + r * GROUP + at % GROUP, x);
      else
        _mm512_mask_storeu_ps(result->out + (row + r) * result->out_stride + at, there, x);
    }
  }
}

#endif
