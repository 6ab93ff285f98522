// fp32 to the parameter's dtype: to nearest even, or stochastically with the 16-bit fields of domain 4.
// Results are 16-bit patterns; elements 2p and 2p + 1 share the 32-bit word p of a block, as they do in memory.
#pragma once

#include "philox.h"

namespace zk {

constexpr uint32_t kInfinity = 0x7f800000u;

template <class U>
ZK_HD U magnitude(U b) {
  return b & Splat<U>::of(0x7fffffffu);
}

// fp32 to bf16 bits in the high half (the low half is garbage). A NaN is not incremented: its quiet bit, which every
// arithmetic result has, survives the truncation.
template <class F>
ZK_HD auto bf16_nearest(F x) {
  const auto b = bits(x);
  using U = decltype(bits(x));
  return b + zero_if_nan(x, Splat<U>::of(0x7fffu) + ((b >> 16) & Splat<U>::of(1u)));
}

// u16: the field in the low half. Adds it below the kept bits and truncates; infinities and NaN pass.
template <class U>
ZK_HD U bf16_stochastic(U b, U u16) {
  return select_ge(magnitude(b), kInfinity, b, b + u16);
}

// fp32 to the fp32 bits of an fp16 value: adds the top 13 bits of u16 below the kept bits and truncates. Below 2^-14 an
// fp16 keeps fewer bits; adding 2^-14 first moves its last bit, 2^-24, to where a normal has it.
template <class F, class U>
ZK_HD F half_stochastic(F x, U u16) {
  const U b = bits(x), sign = b & Splat<U>::of(0x80000000u), mag = magnitude(b);
  const uint32_t tiny = 0x38800000u;  // 2^-14
  const F tiny_f = Splat<F>::of(from_bits(tiny));
  const U shifted = select_ge(mag, tiny, mag, bits(add(from_bits(mag), tiny_f)));
  const U rounded = (shifted + (u16 >> 3)) & Splat<U>::of(0xffffe000u);
  const U unshifted = select_ge(mag, tiny, rounded, bits(add(from_bits(rounded), Splat<F>::of(-from_bits(tiny)))));
  return from_bits(select_ge(mag, kInfinity, b, unshifted | sign));
}

}  // namespace zk
