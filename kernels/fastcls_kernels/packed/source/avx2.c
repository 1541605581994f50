/* The kernels in AVX2. */
#include "vectors_avx2.h"

#include "products.c"
#include "attention.c"
#include "layer.c"
#include "embedding.c"
#include "exports.c"
