/* One layer of a post-norm encoder over packed sequences. */
#ifndef FASTCLS_LAYER_H
#define FASTCLS_LAYER_H

#include "products.h"

typedef struct {
  int32_t width, num_heads, head_dim, inner; /* inner: columns of the feed-forward */
  int32_t function;                          /* an `activation` */
  float scale, eps;
  int32_t padding;
  weight_t qkv, out, up, down;
  const float *attention_norm, *attention_norm_bias, *output_norm, *output_norm_bias; /* [width] */
} layer_t;

/* Numbers of `scratch` that attention needs. */
INLINE size_t scratch_of(const layer_t *layer, int longest) {
  return (size_t)panels_of(longest) * PANEL * (layer->head_dim + 2 * ROWS) + ROWS * layer->head_dim;
}

/* In place; returns the weights' sum. Lanes beyond `length` become zero. */
INLINE float softmax_row(float *scores, int length) {
  const int whole = length / LANES * LANES;
  const lanes rest = first_lanes(length - whole);
  vec highest = vec_of(-INFINITY);
  for (int i = 0; i < whole; i += LANES) highest = larger(highest, load(scores + i));
  if (whole < length) highest = larger(highest, load_or(rest, scores + whole, vec_of(-INFINITY)));
  const vec shift = vec_of(highest_of(highest));
  vec total = zero();
  for (int i = 0; i < whole; i += LANES) {
    const vec weight = exp_of(subtract(load(scores + i), shift));
    total = add(total, weight);
    store(scores + i, weight);
  }
  if (whole < length) {
    const vec weight = choose(rest, exp_of(subtract(load(scores + whole), shift)), zero());
    total = add(total, weight);
    store(scores + whole, weight);
  }
  return sum_of(total);
}

#endif
