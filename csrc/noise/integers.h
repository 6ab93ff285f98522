// Integers from fp32: weights of eight bits, and squares whose sum no order changes.
#pragma once

#include "philox.h"

namespace zk {

// z^2 in units of 2^-20, to nearest even; |z| <= 6.556, so 26 bits.
template <class F>
ZK_HD auto square_units(F z) {
  return nearest_int(mul(mul(z, z), Splat<F>::of(1048576.0f)));
}

// round(x), clamped to [low, high]; NaN becomes low. Clamping first is the same, since the bounds are integers, and leaves
// values that every conversion takes. u16: the field in the low half.
template <class F>
ZK_HD auto quantize_nearest(F x, float low, float high) {
  return nearest_int(clamp(x, Splat<F>::of(low), Splat<F>::of(high)));
}

template <class F, class U>
ZK_HD U quantize_stochastic(F x, U u16, float low, float high) {
  const F moved = fma(signed_to_float(u16), Splat<F>::of(0x1p-16f), x);  // the product is exact
  return floor_int(clamp(moved, Splat<F>::of(low), Splat<F>::of(high)));
}

}  // namespace zk
