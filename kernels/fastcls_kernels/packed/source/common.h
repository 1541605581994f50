/* What all kernels share, whatever the vectors.

   NaN must stay NaN: `larger` and `smaller` give their second operand where either is NaN, so the number that is looked at
   stands second. */
#ifndef FASTCLS_COMMON_H
#define FASTCLS_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <immintrin.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#endif
