/* Functions of vectors, by polynomials. */
#ifndef FASTCLS_FUNCTIONS_H
#define FASTCLS_FUNCTIONS_H

enum activation { NONE, GELU, GELU_TANH, RELU, SILU, TANH };

INLINE vec exp_of(vec x) {
  /* 2^n e^r, |r| <= ln(2) / 2, by the polynomial of Taylor's series, whose first left-out term is below 2^-25. */
  x = larger(vec_of(-104.0f), x);
  x = smaller(vec_of(89.0f), x);
  const vec n = nearest(times(x, vec_of(1.44269504f)));
  vec r = minus_times(x, n, vec_of(0.693145752f));
  r = minus_times(r, n, vec_of(1.42860677e-6f));
  vec p = vec_of(1.0f / 5040);
  p = times_plus(p, r, vec_of(1.0f / 720));
  p = times_plus(p, r, vec_of(1.0f / 120));
  p = times_plus(p, r, vec_of(1.0f / 24));
  p = times_plus(p, r, vec_of(1.0f / 6));
  p = times_plus(p, r, vec_of(0.5f));
  p = times_plus(p, r, vec_of(1.0f));
  p = times_plus(p, r, vec_of(1.0f));
  return times_power_of_2(p, n);
}

INLINE vec erf_of(vec x) {
  /* Near zero an odd polynomial, else 1 - exp(-t P(t)); both P are least-squares fits, weighted towards equal errors. */
  const vec t = absolute(x), s = times(x, x);
  vec near = vec_of(8.409920532e-05f);
  near = times_plus(near, s, vec_of(-8.152627941e-04f));
  near = times_plus(near, s, vec_of(5.201960229e-03f));
  near = times_plus(near, s, vec_of(-2.685979860e-02f));
  near = times_plus(near, s, vec_of(1.128370331e-01f));
  near = times_plus(near, s, vec_of(-3.761263430e-01f));
  near = times_plus(near, s, vec_of(1.128379167e+00f));
  near = times(near, x);
  /* Beyond 4 the result is 1. */
  const vec u = smaller(vec_of(4.0f), t);
  vec far = vec_of(1.076335790e-05f);
  far = times_plus(far, u, vec_of(-3.180614490e-04f));
  far = times_plus(far, u, vec_of(3.622925564e-03f));
  far = times_plus(far, u, vec_of(-2.372019962e-02f));
  far = times_plus(far, u, vec_of(1.061876257e-01f));
  far = times_plus(far, u, vec_of(6.351814896e-01f));
  far = times_plus(far, u, vec_of(1.128640966e+00f));
  far = subtract(vec_of(1.0f), exp_of(minus_times(zero(), far, u)));
  return choose(above(t, vec_of(0.9f)), signed_as(far, x), near);
}

INLINE vec rough_erf_of(vec x) {
  /* An odd polynomial up to 3, off by 2.4e-5 at most: a third of the time, for numbers that are rounded coarser next. */
  const vec t = smaller(vec_of(3.0f), larger(vec_of(-3.0f), x)), s = times(t, t);
  vec p = vec_of(4.074195379e-08f);
  p = times_plus(p, s, vec_of(-1.944816813e-06f));
  p = times_plus(p, s, vec_of(4.106042971e-05f));
  p = times_plus(p, s, vec_of(-5.110360662e-04f));
  p = times_plus(p, s, vec_of(4.235423568e-03f));
  p = times_plus(p, s, vec_of(-2.510285076e-02f));
  p = times_plus(p, s, vec_of(1.110793201e-01f));
  p = times_plus(p, s, vec_of(-3.753148656e-01f));
  p = times_plus(p, s, vec_of(1.128268423e+00f));
  /* Beyond 3 the sign, so that GELU of a number far from zero is the number or nothing. */
  return choose(above(vec_of(3.0f), absolute(x)), times(p, t), times(t, vec_of(1.0f / 3)));
}

INLINE vec sigmoid_of(vec x) {
  const vec one = vec_of(1.0f);
  return divide(one, add(one, exp_of(subtract(zero(), x))));
}

INLINE vec tanh_of(vec x) {
  /* Up to 1.2 an odd polynomial, a least-squares fit: 1 - 2 / (e^2x + 1) loses digits there. */
  const vec s = times(x, x);
  vec near = vec_of(-2.150083522e-05f);
  near = times_plus(near, s, vec_of(2.065340608e-04f));
  near = times_plus(near, s, vec_of(-9.744262561e-04f));
  near = times_plus(near, s, vec_of(3.181782193e-03f));
  near = times_plus(near, s, vec_of(-8.633885312e-03f));
  near = times_plus(near, s, vec_of(2.178923966e-02f));
  near = times_plus(near, s, vec_of(-5.395200771e-02f));
  near = times_plus(near, s, vec_of(1.333316957e-01f));
  near = times_plus(near, s, vec_of(-3.333332758e-01f));
  near = times_plus(times(near, s), x, x);
  const vec t = absolute(x), one = vec_of(1.0f);
  const vec far = subtract(one, divide(vec_of(2.0f), add(exp_of(add(t, t)), one)));
  return choose(above(t, vec_of(1.2f)), signed_as(far, x), near);
}

INLINE vec activate(enum activation function, int is_exact, vec x) {
  const vec half = times(vec_of(0.5f), x);
  switch (function) {
    case GELU:
      x = times(x, vec_of(0.707106781f));
      return times_plus(half, is_exact ? erf_of(x) : rough_erf_of(x), half);
    case GELU_TANH: {
      const vec cube = times(times(x, x), x);
      const vec inner = times(vec_of(0.797884561f), times_plus(vec_of(0.044715f), cube, x));
      return times_plus(half, tanh_of(inner), half);
    }
    case RELU:
      return larger(zero(), x);
    case SILU:
      return times(x, sigmoid_of(x));
    case TANH:
      return tanh_of(x);
    default:
      return x;
  }
}

#endif
