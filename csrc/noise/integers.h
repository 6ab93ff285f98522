// Integers from fp32: weights of eight bits, and squares whose sum no order changes.
#pragma once

#include "philox.h"

namespace zk {

// z^2 in units of 2^-20, to nearest even; |z| <= 6.556, so 26 bits.
template <class F>
ZK_HD auto square_units(F z) {
  return nearest_int(mul(mul(z, z), Splat<F>::of(1048576.0f)));
}

// x to an integer: nearest_int, or stochastically floor(x + u16 / 65536) with the field in the low half of u16.
// The caller clamps x before (clamp: NaN becomes the lower bound). The bounds are integers, so that clamping the result
// would give the same, and every conversion takes what is left.
template <class F, class U>
ZK_HD U integer_stochastic(F x, U u16) {
  return floor_int(fma(signed_to_float(u16), Splat<F>::of(0x1p-16f), x));  // the product is exact
}

}  // namespace zk
