/* The functions that are called from Python. */
#include "layer.h"

EXPORT void FORM(fastcls_product)(const weight_t *weight, const float *x, ptrdiff_t stride, int count, void *values, float *scales, int32_t *zero_points,
                     int function, const float *residual, ptrdiff_t residual_stride, float *out, int threads) {
  rows_t rows = {values, weight->in_features, scales, zero_points, weight->in_features, groups_of(weight->in_features)};
  read_rows(weight->kind, x, stride, count, &rows, threads);
  const result_t result = {(enum activation)function, residual, residual_stride, out, weight->out_features, NULL};
  product(weight, &rows, count, &result, threads);
}
