#include "layer.h"

/* A table of embeddings: float32 or bfloat16 as a model holds it, or int8 with a scale for each row and group. */
typedef struct {
  int32_t kind, width;
  const void *values;  /* [rows][width] */
  const float *scales; /* [rows][groups], of INT8 */
} table_t;

INLINE vec element(const table_t *table, ptrdiff_t row, int column) {
  const ptrdiff_t place = row * table->width + column;
  if (table->kind == INT8)
    return times(load_bytes((const int8_t *)table->values + place), vec_of(table->scales[row * groups_of(table->width) + column / GROUP]));
  if (table->kind == BFLOAT16) return load_bfloat16((const uint16_t *)table->values + place);
  return load((const float *)table->values + place);
}

/* Layer norm of the sum of word, token type and position embeddings; a table may be NULL, and ids of types for type 0. */
EXPORT void FORM(fastcls_embed)(const table_t *words, const table_t *types, const table_t *positions, const int32_t *word_ids,
                          const int32_t *type_ids, const int32_t *position_ids, const float *weight, const float *bias, float eps,
                          int count, float *out, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int row = 0; row < count; row++) {
    float *to = out + (ptrdiff_t)row * words->width;
    for (int column = 0; column < words->width; column += LANES) {
      vec sum = element(words, word_ids[row], column);
      if (types) sum = add(sum, element(types, type_ids ? type_ids[row] : 0, column));
      if (positions) sum = add(sum, element(positions, position_ids[row], column));
      store(to + column, sum);
    }
    add_norm_row(to, words->width, weight, bias, eps, to);
  }
}
