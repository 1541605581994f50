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

/* One head of one sequence: some of its rows as queries. */
void attend(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
            const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch);
/* The same in bfloat16, summed in float32. */
void attend_bfloat16(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
                     const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch);
/* One query row. */
void attend_first(const layer_t *layer, const float *query, const float *keys, const float *values, ptrdiff_t stride,
                  int length, int head, float *out, float *scores);
void add_norm_row(const float *x, int width, const float *weight, const float *bias, float eps, float *out);

/* In place; returns the weights' sum. Lanes beyond `length` become zero. */
INLINE float softmax_row(float *scores, int length) {
  const int whole = length / LANES, rest = length % LANES;
  vec highest = vec_of(-INFINITY);
  for (int i = 0; i < whole; i++) highest = _mm512_max_ps(highest, load(scores + LANES * i));
  if (rest) highest = _mm512_max_ps(highest, _mm512_mask_loadu_ps(vec_of(-INFINITY), first_lanes(rest), scores + LANES * whole));
  const vec shift = vec_of(_mm512_reduce_max_ps(highest));
  vec total = _mm512_setzero_ps();
  for (int i = 0; i < whole; i++) {
    const vec weight = exp_of(_mm512_sub_ps(load(scores + LANES * i), shift));
    total = _mm512_add_ps(total, weight);
    store(scores + LANES * i, weight);
  }
  if (rest) {
    const vec weight = _mm512_maskz_mov_ps(first_lanes(rest), exp_of(_mm512_sub_ps(load(scores + LANES * whole), shift)));
    total = _mm512_add_ps(total, weight);
    store(scores + LANES * whole, weight);
  }
  return _mm512_reduce_add_ps(total);
}

#endif
