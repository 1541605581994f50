/* Vectors of 16 float32 numbers (AVX-512), and the functions of them that the kernels share.

   NaN must stay NaN: _mm512_max_ps and _mm512_min_ps give their second operand where either is NaN, so the number that
   is looked at stands second. */
#ifndef FASTCLS_VECTORS_H
#define FASTCLS_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#include <immintrin.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef __m512 vec;

enum activation { NONE, GELU, GELU_TANH, RELU, SILU, TANH };

INLINE vec vec_of(float x) { return _mm512_set1_ps(x); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec x) { _mm512_storeu_ps(to, x); }

/* The first `count` lanes, count < 16. */
INLINE __mmask16 first_lanes(int count) { return (__mmask16)((1u << count) - 1u); }

/* 16 vectors of 16 words: row i's word j goes to row j's place i. Four rounds, each of pairs of rows. */
INLINE void transpose(__m512i rows[LANES]) {
  __m512i half[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + j + 2]);
    }
  /* Here rows[4 a + b] holds, in each of its four parts c, word 4 c + b of rows 4 a to 4 a + 3. */
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    half[b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
    half[4 + b] = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
    half[8 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    half[12 + b] = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
  }
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    rows[b] = _mm512_shuffle_i32x4(half[b], half[8 + b], 0x88);
    rows[4 + b] = _mm512_shuffle_i32x4(half[4 + b], half[12 + b], 0x88);
    rows[8 + b] = _mm512_shuffle_i32x4(half[b], half[8 + b], 0xdd);
    rows[12 + b] = _mm512_shuffle_i32x4(half[4 + b], half[12 + b], 0xdd);
  }
}

INLINE vec exp_of(vec x) {
  /* 2^n e^r, |r| <= ln(2) / 2, by the polynomial of Taylor's series, whose first left-out term is below 2^-25. */
  x = _mm512_max_ps(vec_of(-104.0f), x);
  x = _mm512_min_ps(vec_of(89.0f), x);
  const vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, vec_of(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vec r = _mm512_fnmadd_ps(n, vec_of(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, vec_of(1.42860677e-6f), r);
  vec p = vec_of(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, vec_of(0.5f));
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f));
  p = _mm512_fmadd_ps(p, r, vec_of(1.0f));
  return _mm512_scalef_ps(p, n);
}

/* A positive number with the sign of another. */
INLINE vec signed_as(vec number, vec sign) {
  return _mm512_or_ps(number, _mm512_and_ps(sign, vec_of(-0.0f)));
}

INLINE vec erf_of(vec x) {
  /* Near zero an odd polynomial, else 1 - exp(-t P(t)); both P are least-squares fits, weighted towards equal errors. */
  const vec t = _mm512_abs_ps(x), s = _mm512_mul_ps(x, x);
  vec near = vec_of(8.409920532e-05f);
  near = _mm512_fmadd_ps(near, s, vec_of(-8.152627941e-04f));
  near = _mm512_fmadd_ps(near, s, vec_of(5.201960229e-03f));
  near = _mm512_fmadd_ps(near, s, vec_of(-2.685979860e-02f));
  near = _mm512_fmadd_ps(near, s, vec_of(1.128370331e-01f));
  near = _mm512_fmadd_ps(near, s, vec_of(-3.761263430e-01f));
  near = _mm512_fmadd_ps(near, s, vec_of(1.128379167e+00f));
  near = _mm512_mul_ps(near, x);
  /* Beyond 4 the result is 1. */
  const vec u = _mm512_min_ps(vec_of(4.0f), t);
  vec far = vec_of(1.076335790e-05f);
  far = _mm512_fmadd_ps(far, u, vec_of(-3.180614490e-04f));
  far = _mm512_fmadd_ps(far, u, vec_of(3.622925564e-03f));
  far = _mm512_fmadd_ps(far, u, vec_of(-2.372019962e-02f));
  far = _mm512_fmadd_ps(far, u, vec_of(1.061876257e-01f));
  far = _mm512_fmadd_ps(far, u, vec_of(6.351814896e-01f));
  far = _mm512_fmadd_ps(far, u, vec_of(1.128640966e+00f));
  far = _mm512_sub_ps(vec_of(1.0f), exp_of(_mm512_fnmadd_ps(far, u, _mm512_setzero_ps())));
  return _mm512_mask_mov_ps(near, _mm512_cmp_ps_mask(t, vec_of(0.9f), _CMP_GT_OQ), signed_as(far, x));
}

INLINE vec rough_erf_of(vec x) {
  /* An odd polynomial up to 3, off by 2.4e-5 at most: a third of the time, for numbers that are rounded coarser next. */
  const vec t = _mm512_min_ps(vec_of(3.0f), _mm512_max_ps(vec_of(-3.0f), x)), s = _mm512_mul_ps(t, t);
  vec p = vec_of(4.074195379e-08f);
  p = _mm512_fmadd_ps(p, s, vec_of(-1.944816813e-06f));
  p = _mm512_fmadd_ps(p, s, vec_of(4.106042971e-05f));
  p = _mm512_fmadd_ps(p, s, vec_of(-5.110360662e-04f));
  p = _mm512_fmadd_ps(p, s, vec_of(4.235423568e-03f));
  p = _mm512_fmadd_ps(p, s, vec_of(-2.510285076e-02f));
  p = _mm512_fmadd_ps(p, s, vec_of(1.110793201e-01f));
  p = _mm512_fmadd_ps(p, s, vec_of(-3.753148656e-01f));
  p = _mm512_fmadd_ps(p, s, vec_of(1.128268423e+00f));
  /* Beyond 3 the sign, so that GELU of a number far from zero is the number or nothing. */
  const __mmask16 is_far = _mm512_cmp_ps_mask(_mm512_abs_ps(x), vec_of(3.0f), _CMP_GE_OQ);
  return _mm512_mask_mul_ps(_mm512_mul_ps(p, t), is_far, t, vec_of(1.0f / 3));
}

INLINE vec sigmoid_of(vec x) {
  const vec one = vec_of(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

INLINE vec tanh_of(vec x) {
  /* Up to 1.2 an odd polynomial, a least-squares fit: 1 - 2 / (e^2x + 1) loses digits there. */
  const vec s = _mm512_mul_ps(x, x);
  vec near = vec_of(-2.150083522e-05f);
  near = _mm512_fmadd_ps(near, s, vec_of(2.065340608e-04f));
  near = _mm512_fmadd_ps(near, s, vec_of(-9.744262561e-04f));
  near = _mm512_fmadd_ps(near, s, vec_of(3.181782193e-03f));
  near = _mm512_fmadd_ps(near, s, vec_of(-8.633885312e-03f));
  near = _mm512_fmadd_ps(near, s, vec_of(2.178923966e-02f));
  near = _mm512_fmadd_ps(near, s, vec_of(-5.395200771e-02f));
  near = _mm512_fmadd_ps(near, s, vec_of(1.333316957e-01f));
  near = _mm512_fmadd_ps(near, s, vec_of(-3.333332758e-01f));
  near = _mm512_fmadd_ps(_mm512_mul_ps(near, s), x, x);
  const vec t = _mm512_abs_ps(x), one = vec_of(1.0f);
  const vec far = _mm512_sub_ps(one, _mm512_div_ps(vec_of(2.0f), _mm512_add_ps(exp_of(_mm512_add_ps(t, t)), one)));
  return _mm512_mask_mov_ps(near, _mm512_cmp_ps_mask(t, vec_of(1.2f), _CMP_GT_OQ), signed_as(far, x));
}

INLINE vec activate(enum activation function, int is_exact, vec x) {
  const vec half = _mm512_mul_ps(vec_of(0.5f), x);
  switch (function) {
    case GELU:
      x = _mm512_mul_ps(x, vec_of(0.707106781f));
      return _mm512_fmadd_ps(half, is_exact ? erf_of(x) : rough_erf_of(x), half);
    case GELU_TANH: {
      const vec cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      const vec inner = _mm512_mul_ps(vec_of(0.797884561f), _mm512_fmadd_ps(vec_of(0.044715f), cube, x));
      return _mm512_fmadd_ps(half, tanh_of(inner), half);
    }
    case RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), x);
    case SILU:
      return _mm512_mul_ps(x, sigmoid_of(x));
    case TANH:
      return tanh_of(x);
    default:
      return x;
  }
}

#endif
