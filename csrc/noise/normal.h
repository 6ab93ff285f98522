// Domain 1: eight standard normals from the four words of a block, by a Box-Muller transform made of exact
// steps. Formula and polynomials: docs/contract.md.
#pragma once

#include "philox.h"

namespace zk {

// A polynomial as a Horner chain of fma, from the highest power down. The coefficients are given as fp32
// bits, from the lowest power up.
template <class F>
ZK_HD F horner(F x, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  F p = fma(Splat<F>::of(from_bits(c3)), x, Splat<F>::of(from_bits(c2)));
  p = fma(p, x, Splat<F>::of(from_bits(c1)));
  return fma(p, x, Splat<F>::of(from_bits(c0)));
}

template <class F>
ZK_HD F horner(F x, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t c4) {
  F p = fma(Splat<F>::of(from_bits(c4)), x, Splat<F>::of(from_bits(c3)));
  p = fma(p, x, Splat<F>::of(from_bits(c2)));
  p = fma(p, x, Splat<F>::of(from_bits(c1)));
  return fma(p, x, Splat<F>::of(from_bits(c0)));
}

constexpr uint32_t kMantissa = 0x007fffffu;

// s = -2 ln(|n| 2^-31) for n = float(int32(v)), where v is odd.
// `mantissa` is always kMantissa. A kernel that passes it as a value known only at run time saves a move,
// because an instruction holds one constant, and the mask and the exponent of 1 would be two (0.45
// instructions an element on sm_90).
template <class F, class U>
ZK_HD F radius_squared(U v, U mantissa) {
  const U n = bits(signed_to_float(v));
  const F m = from_bits(and_or(n, mantissa, Splat<U>::of(0x3f800000u)));
  const F e = signed_to_float(n & Splat<U>::of(0x7f800000u));
  const F linear = fma(e, Splat<F>::of(from_bits(0xb4317218u)), Splat<F>::of(from_bits(0x435eec6fu)));
  return fma(horner(m, 0xc0e28e35u, 0x409e52ccu, 0xc011a278u, 0x3f14d1eeu, 0xbd8030e7u), m, linear);
}

// The radius of v, with the sign of v.
template <class F, class U>
ZK_HD F signed_radius(U v, U mantissa) {
  return from_bits(and_xor(v, Splat<U>::of(0x80000000u), bits(sqrt(radius_squared<F>(v, mantissa)))));
}

// Radius r, and the angle in the low half of next.
template <class F, class U>
ZK_HD void turn(F r, U next, F& z0, F& z1) {
  const F t = low_half_to_float(next);
  const F y = mul(t, t);
  z0 = mul(r, horner(y, 0x3f7fff90u, 0xb09de2d2u, 0x20815232u, 0x8f9c6ea9u));
  z1 = mul(r, mul(horner(y, 0x38490faeu, 0xa8a5593cu, 0x1822ae79u, 0x870dfca3u), t));
}

struct Nothing {
  ZK_HD void operator()(int) const {}
};

// The eight normals of a block. meanwhile(p) is independent work of the caller that is done beside pair p.
template <class F, class U, class Other = Nothing>
ZK_HD void normal8(const Words<U>& words, F z[8], U mantissa = Splat<U>::of(kMantissa),
                   Other meanwhile = {}) {
  U v[4];
  for (int p = 0; p < 4; ++p) v[p] = words.w[p] | Splat<U>::of(1u);
  for (int p = 0; p < 4; ++p) {
    turn(signed_radius<F>(v[p], mantissa), next_word(v, p), z[2 * p], z[2 * p + 1]);
    meanwhile(p);
  }
}

}  // namespace zk
