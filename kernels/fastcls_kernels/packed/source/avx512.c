/* The kernels in AVX-512. */
#include "vectors_avx512.h"

#include "products.c"
#include "attention.c"
#include "layer.c"
#include "embedding.c"
#include "exports.c"
/* Last, since it is for CPUs with AVX512_BF16 alone. */
#include "bfloat16.c"
