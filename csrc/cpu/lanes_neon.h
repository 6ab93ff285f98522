// Four lanes: NEON (Advanced SIMD), which every 64-bit ARM machine has.
//
// Lane l of a register computes block first + l. Afterwards join() brings the words into the order of memory:
// register i is block i, and its lane l is word l, which stands for a pair of elements. So the eight elements
// of register i are those of one block, as lanes_avx2.h describes it for two blocks.
//
// Where this file and lanes_avx2.h choose different instructions, NEON has one that is shorter: comparing
// with a constant and selecting, loads that separate even from odd elements (ld2), and interleaving of 16-bit
// halves (trn).
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "../noise/lanes.h"
#include "../noise/rounding.h"

namespace zk::cpu {

struct F4 {
  float32x4_t v;
};
struct U4 {
  uint32x4_t v;
};
// A Philox word of four blocks. It is a type of its own because the other instruction sets need one.
struct C4 {
  uint32x4_t v;
};

ZK_HD U4 operator&(U4 a, U4 b) { return {vandq_u32(a.v, b.v)}; }
ZK_HD U4 operator|(U4 a, U4 b) { return {vorrq_u32(a.v, b.v)}; }
ZK_HD U4 operator^(U4 a, U4 b) { return {veorq_u32(a.v, b.v)}; }
ZK_HD U4 operator+(U4 a, U4 b) { return {vaddq_u32(a.v, b.v)}; }
// Shifts by a variable amount: with a constant the compiler makes the immediate form of them.
ZK_HD U4 operator>>(U4 a, int n) { return {a.v >> static_cast<uint32_t>(n)}; }
ZK_HD U4 operator<<(U4 a, int n) { return {a.v << static_cast<uint32_t>(n)}; }
ZK_HD U4 xor3(U4 a, U4 b, U4 c) { return a ^ b ^ c; }
ZK_HD U4 and_or(U4 a, U4 b, U4 c) { return (a & b) | c; }
ZK_HD U4 and_xor(U4 a, U4 b, U4 c) { return (a & b) ^ c; }
ZK_HD C4 operator^(C4 a, C4 b) { return {veorq_u32(a.v, b.v)}; }
ZK_HD C4 xor3(C4 a, C4 b, C4 c) { return a ^ b ^ c; }

ZK_HD F4 add(F4 a, F4 b) { return {vaddq_f32(a.v, b.v)}; }
ZK_HD F4 mul(F4 a, F4 b) { return {vmulq_f32(a.v, b.v)}; }
ZK_HD F4 fma(F4 a, F4 b, F4 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
ZK_HD F4 sqrt(F4 a) { return {vsqrtq_f32(a.v)}; }
ZK_HD U4 bits(F4 a) { return {vreinterpretq_u32_f32(a.v)}; }
ZK_HD F4 from_bits(U4 a) { return {vreinterpretq_f32_u32(a.v)}; }
ZK_HD F4 signed_to_float(U4 a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
// The low half in the high place is the integer times 2^16, which the conversion divides out again.
ZK_HD F4 low_half_to_float(U4 a) {
  return {vcvtq_n_f32_s32(vreinterpretq_s32_u32(vshlq_n_u32(a.v, 16)), 16)};
}
ZK_HD U4 select_ge(U4 a, uint32_t threshold, U4 yes, U4 no) {
  return {vbslq_u32(vcgeq_u32(a.v, vdupq_n_u32(threshold)), yes.v, no.v)};
}
// Each product has 64 bits, so the four of them take two registers; uzp collects their halves.
ZK_HD void mul_wide(C4 c, uint32_t m, C4& hi, C4& lo) {
  const uint32x4_t factor = vdupq_n_u32(m);
  const uint32x4_t low = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(c.v), vget_low_u32(factor)));
  const uint32x4_t high = vreinterpretq_u32_u64(vmull_high_u32(c.v, factor));
  lo = {vuzp1q_u32(low, high)};
  hi = {vuzp2q_u32(low, high)};
}
// Transposes: register i of x has word i of four blocks, register i of w the four words of block i.
ZK_HD void join(const C4 x[4], U4 w[4]) {
  const auto pairs = [](uint32x4_t a) { return vreinterpretq_u64_u32(a); };
  const auto words = [](uint64x2_t a) { return vreinterpretq_u32_u64(a); };
  const auto a = pairs(vtrn1q_u32(x[0].v, x[1].v)), b = pairs(vtrn2q_u32(x[0].v, x[1].v));
  const auto c = pairs(vtrn1q_u32(x[2].v, x[3].v)), d = pairs(vtrn2q_u32(x[2].v, x[3].v));
  w[0] = {words(vtrn1q_u64(a, c))};
  w[1] = {words(vtrn1q_u64(b, d))};
  w[2] = {words(vtrn2q_u64(a, c))};
  w[3] = {words(vtrn2q_u64(b, d))};
}
ZK_HD U4 next_word(const U4 w[4], int i) { return {vextq_u32(w[i].v, w[i].v, 1)}; }

ZK_HD F4 sqrt_full(F4 a) { return sqrt(a); }
ZK_HD F4 div(F4 a, F4 b) { return {vdivq_f32(a.v, b.v)}; }
ZK_HD F4 select_top(U4 a, F4 yes, F4 no) {
  return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_u32(a.v)), yes.v, no.v)};
}
ZK_HD F4 clamp(F4 x, F4 low, F4 high) {
  // low for NaN, which fmax would keep
  const float32x4_t above = vbslq_f32(vcgtq_f32(x.v, low.v), x.v, low.v);
  return {vbslq_f32(vcltq_f32(above, high.v), above, high.v)};
}
ZK_HD U4 nearest_int(F4 x) { return {vreinterpretq_u32_s32(vcvtnq_s32_f32(x.v))}; }
ZK_HD U4 floor_int(F4 x) { return {vreinterpretq_u32_s32(vcvtmq_s32_f32(x.v))}; }

}  // namespace zk::cpu

namespace zk {
template <>
struct Splat<cpu::F4> {
  static ZK_HD cpu::F4 of(float x) { return {vdupq_n_f32(x)}; }
};
template <>
struct Splat<cpu::U4> {
  static ZK_HD cpu::U4 of(uint32_t x) { return {vdupq_n_u32(x)}; }
};
template <>
struct Splat<cpu::C4> {
  static ZK_HD cpu::C4 of(uint32_t x) { return {vdupq_n_u32(x)}; }
};
}  // namespace zk

namespace zk::cpu {

struct Neon {
  using F = F4;
  using U = U4;
  using C = C4;
  static constexpr int width = 4;

  // Four constants as a vector.
  static ZK_HD uint32x4_t lanes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return uint32x4_t{a, b, c, d};
  }

  // The block indices first .. first + 3. `first` is a multiple of 4, so no addition carries into the next
  // word.
  static ZK_HD C counter(uint32_t first) { return {vaddq_u32(vdupq_n_u32(first), lanes(0, 1, 2, 3))}; }

  static ZK_HD void load_words(const uint32_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i) w[i] = {vld1q_u32(p + 4 * i)};
  }
  static ZK_HD void store_words(uint32_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i) vst1q_u32(p + 4 * i, w[i].v);
  }

  // Four consecutive floats, one in each lane.
  static ZK_HD F load_row(const float* p) { return {vld1q_f32(p)}; }
  static ZK_HD void store_row(float* p, F x) { vst1q_f32(p, x.v); }
  // Adds the float of each lane to one of four consecutive doubles.
  static ZK_HD void add_row(double* p, F x) {
    vst1q_f64(p, vaddq_f64(vld1q_f64(p), vcvt_f64_f32(vget_low_f32(x.v))));
    vst1q_f64(p + 2, vaddq_f64(vld1q_f64(p + 2), vcvt_high_f64_f32(x.v)));
  }

  static ZK_HD void load_floats(const float* p, F x[8]) {
    for (int i = 0; i < 4; ++i) {
      const float32x4x2_t pairs = vld2q_f32(p + 8 * i);
      x[2 * i] = {pairs.val[0]};
      x[2 * i + 1] = {pairs.val[1]};
    }
  }
  static ZK_HD void store_floats(float* p, const F x[8]) {
    for (int i = 0; i < 4; ++i) vst2q_f32(p + 8 * i, {{x[2 * i].v, x[2 * i + 1].v}});
  }

  // Two registers of pairs at once: the even elements of both in one register of 16-bit numbers, the odd in
  // another.
  static ZK_HD void load_halves(const uint16_t* p, F x[8]) {
    for (int i = 0; i < 4; i += 2) {
      const uint16x8x2_t pairs = vld2q_u16(p + 8 * i);
      for (int odd = 0; odd < 2; ++odd) {
        const float16x8_t both = vreinterpretq_f16_u16(pairs.val[odd]);
        x[2 * i + odd] = {vcvt_f32_f16(vget_low_f16(both))};
        x[2 * i + 2 + odd] = {vcvt_high_f32_f16(both)};
      }
    }
  }
  static ZK_HD void store_halves(uint16_t* p, const F x[8]) {
    for (int i = 0; i < 4; i += 2) {
      uint16x8x2_t pairs;
      for (int odd = 0; odd < 2; ++odd) {
        pairs.val[odd] = vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x[2 * i + odd].v),
                                                                 x[2 * i + 2 + odd].v));
      }
      vst2q_u16(p + 8 * i, pairs);
    }
  }

  // Lane l takes bytes 2 l and 2 l + 1.
  static ZK_HD void load_byte_pairs(const uint8_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i) w[i] = {vmovl_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)))};
  }
  static ZK_HD void store_byte_pairs(uint8_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i) vst1_u8(p + 8 * i, vreinterpret_u8_u16(vmovn_u32(w[i].v)));
  }

  // Bits 30 and 31 of each lane become the mask bits of its two elements. A register has 8 elements, one mask
  // byte.
  static ZK_HD U mask_bits(const uint8_t* bytes, int i) {
    const int32x4_t shift = vreinterpretq_s32_u32(lanes(30, 28, 26, 24));
    return {vshlq_u32(vdupq_n_u32(bytes[i]), shift)};
  }

  // ARM cores notice by themselves that whole cache lines are written one after the other, and then do not
  // read them first; there is nothing to ask for.
  static ZK_HD void stream(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
  static ZK_HD void stream_end() {}

  // bf16_nearest (noise/rounding.h) of two elements at once, in 16-bit halves of a word, as lanes_avx2.h
  // explains it: here six instructions.
  static ZK_HD U pack_bf16(U b0, U b1) {
    const uint16x8_t first = vreinterpretq_u16_u32(b0.v), second = vreinterpretq_u16_u32(b1.v);
    const uint16x8_t high = vtrn2q_u16(first, second), low = vtrn1q_u16(first, second);
    const uint16x8_t half = vorrq_u16(vandq_u16(high, vdupq_n_u16(1)), vdupq_n_u16(0x7ffe));
    return {vreinterpretq_u32_u16(vsraq_n_u16(high, vrhaddq_u16(low, half), 15))};
  }

  // +c or -c for the pairs of register i: where an element's sign bit is set, -c. The word at `signs` has the
  // sign bytes of the tile's four vecs, and byte i of it is the signs of the eight elements of register i.
  static ZK_HD void plus_minus(const uint32_t* signs, int, int i, F c, F& c0, F& c1) {
    const uint32x4_t word = vdupq_n_u32(*signs),
                     bit = lanes(1u << 8 * i, 4u << 8 * i, 16u << 8 * i, 64u << 8 * i);
    const float32x4_t minus = vnegq_f32(c.v);
    c0 = {vbslq_f32(vtstq_u32(word, bit), minus, c.v)};
    c1 = {vbslq_f32(vtstq_u32(word, vaddq_u32(bit, bit)), minus, c.v)};
  }
};

}  // namespace zk::cpu
