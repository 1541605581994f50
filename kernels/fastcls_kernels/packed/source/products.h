/* Products with a weight that was packed once: out = f(x weight^T + bias) + residual.

   A packed weight is a row of panels of 64 output columns, the last one filled up with zeros. Rows are taken six at a
   time, and so many columns of a panel as leave room in the registers beside the sums: for one step of the weight, and one
   number of a row. A row's sums are added up in the same order whatever else is computed, so its bits depend on that row
   alone. */
#ifndef FASTCLS_PRODUCTS_H
#define FASTCLS_PRODUCTS_H

#include "functions.h"

#define PANEL 64
#define ROWS 6
/* Columns whose sums the registers hold. */
#define BLOCK (LANES * VECTORS)
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

/* Calls a macro with the number of rows as a constant. */
#define BY_COUNT(COUNT, CALL) \
  switch (COUNT) {            \
    case 1: CALL(1) break;    \
    case 2: CALL(2) break;    \
    case 3: CALL(3) break;    \
    case 4: CALL(4) break;    \
    case 5: CALL(5) break;    \
    case 6: CALL(6) break;    \
  }

#define EACH_ROW _Pragma("GCC unroll 6") for (int r = 0; r < count; r++)
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)

/* Sums to results, for a block of columns that begins with `first`: to memory, or to a `tile` of two panels. */
INLINE void finish(const int count, const int is_exact, vec sums[ROWS][VECTORS], const weight_t *weight, int first, int row, const result_t *result, float *tile) {
  for (int j = 0; j < VECTORS && first + LANES * j < weight->out_features; j++) {
    const int at = first + LANES * j, there = least(LANES, weight->out_features - at);
    const vec bias = load(weight->bias + at);
    EACH_ROW {
      vec x = activate(result->function, is_exact, add(sums[r][j], bias));
      if (result->residual)
        x = add(x, load_or(first_lanes(there), result->residual + (row + r) * result->residual_stride + at, zero()));
      if (tile)
        store(tile + r * GROUP + at % GROUP, x);
      else
        store_first(result->out + (row + r) * result->out_stride + at, there, x);
    }
  }
}

#endif
