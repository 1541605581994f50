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

void attend(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
            const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch);
/* One query row. */
void attend_first(const layer_t *layer, const float *query, const float *keys, const float *values, ptrdiff_t stride,
                  int length, int head, float *out, float *scores);
void add_norm_row(const float *x, int width, const float *weight, const float *bias, float eps, float *out);

#endif
