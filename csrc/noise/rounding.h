// fp32 to the parameter's dtype: to nearest even, or stochastically with the 16-bit fields of domain 4.
// Results are 16-bit patterns; elements 2p and 2p + 1 share the 32-bit word p of a block, as they do in
// memory.
#pragma once

#include "philox.h"

namespace zk {

constexpr uint32_t kInfinity = 0x7f800000u;

template <class U>
ZK_HD U magnitude(U b) {
  return b & Splat<U>::of(0x7fffffffu);
}

// None of these looks for NaN and infinities. An infinity has no bits below the kept ones, so nothing can
// carry into it; nor has any NaN here: those from parameters of the dtype that is written end in zeros, the
// host's own is 0x7fc00000 or 0xffc00000, and all others (coefficients, states, weights beside states of
// bf16) are made so (canonical_nan). Only NVIDIA's arithmetic makes NaNs with all bits set: pass_special.
ZK_HD float canonical_nan(float x) { return x != x ? from_bits(0x7fc00000u) : x; }

template <class F>
ZK_HD F without_payload(F x) {
  using U = decltype(bits(x));
  return from_bits(select_ge(magnitude(bits(x)), kInfinity + 1, Splat<U>::of(0x7fc00000u), bits(x)));
}

template <class U>
ZK_HD U pass_special(U b, U rounded) {
  return select_ge(magnitude(b), kInfinity, b, rounded);
}

// fp32 bits to bf16 bits, which stand in the high half of the result. The low half is garbage.
template <class U>
ZK_HD U bf16_nearest(U b) {
  return b + Splat<U>::of(0x7fffu) + ((b >> 16) & Splat<U>::of(1u));
}

// The same, stochastically: the random field, in the low half of u16, is added below the bits that are kept.
template <class U>
ZK_HD U bf16_stochastic(U b, U u16) {
  return b + u16;
}

// The high halves of two words in one: the bf16 values of elements 2p and 2p + 1 as they lie in memory.
template <class U>
ZK_HD U high_halves(U b0, U b1) {
  return and_or(b1, Splat<U>::of(0xffff0000u), b0 >> 16);
}

// fp32, rounded stochastically to a value that fp16 can represent, as fp32. The top 13 bits of the field are
// added below the bits that are kept, and the rest is cut off. Below 2^-14 an fp16 keeps fewer bits. There
// 2^-14 is added first, which moves the last bit that is kept, 2^-24, to where a normal number has it.
template <class F, class U>
ZK_HD F half_stochastic(F x, U u16) {
  const U b = bits(x), mag = magnitude(b);
  constexpr uint32_t tiny = 0x38800000u, minus = 0x80000000u;  // 2^-14
  const U shift = select_ge(mag, tiny, Splat<U>::of(0u), Splat<U>::of(tiny));
  const U rounded = (bits(add(from_bits(mag), from_bits(shift))) + (u16 >> 3)) & Splat<U>::of(0xffffe000u);
  const U moved = bits(add(from_bits(rounded), from_bits(shift | Splat<U>::of(minus))));
  return from_bits(and_or(b, Splat<U>::of(minus), moved));
}

}  // namespace zk
