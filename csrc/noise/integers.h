// fp32 to integers: for weights of eight bits, and for squares whose sum is the same in every order.
#pragma once

#include "philox.h"

namespace zk {

// z^2 in units of 2^-20, rounded to nearest even. Since |z| <= 6.556, the result has at most 26 bits.
template <class F>
ZK_HD auto square_units(F z) {
  return nearest_int(mul(mul(z, z), Splat<F>::of(1048576.0f)));
}

// x rounded stochastically to an integer: floor(x + u16 / 65536), where the low half of u16 holds the random
// field. nearest_int (lanes.h) rounds to nearest. The caller clamps x beforehand, by which NaN becomes the
// lower bound, so that each conversion is defined. As the bounds are integers, clamping afterwards would give
// the same.
template <class F, class U>
ZK_HD U integer_stochastic(F x, U u16) {
  return floor_int(fma(signed_to_float(u16), Splat<F>::of(0x1p-16f), x));  // the product is exact
}

}  // namespace zk
