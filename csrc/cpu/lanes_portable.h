// One lane for every machine: the scalar vocabulary, with conversions to and from fp16 in integers.
#pragma once

#include "../noise/lanes.h"
#include "../noise/rademacher.h"
#include "../noise/rounding.h"

namespace zk::cpu {

struct Portable : Scalar {
  static void load_words(const uint32_t* p, U w[4]) { std::memcpy(w, p, 16); }
  static void store_words(uint32_t* p, const U w[4]) { std::memcpy(p, w, 16); }
  static F load_row(const float* p) { return *p; }
  static void store_row(float* p, F x) { *p = x; }
  static void add_row(double* p, F x) { *p += x; }

  static void load_floats(const float* p, F x[8]) { std::memcpy(x, p, 32); }
  static void store_floats(float* p, const F x[8]) { std::memcpy(p, x, 32); }
  static C counter(uint32_t first) { return first; }

  // Always inlined: other instruction sets' files use them, too.
  static ZK_HD float from_half(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | kInfinity | (rest & 0x3ffu) << 13);
    // The exponent is 112 too small, subnormals included: one exact multiplication.
    return from_bits(sign | bits(from_bits(rest << 13) * from_bits(0x77800000u)));
  }

  static ZK_HD uint32_t to_half(float x) {
    const uint32_t b = bits(x), sign = b >> 16 & 0x8000u, mag = b & 0x7fffffffu;
    if (mag > kInfinity) return sign | 0x7e00u | (mag >> 13 & 0x3ffu);
    if (mag >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
    // adding 1/2 rounds to a multiple of 2^-24, the subnormal unit
    if (mag < 0x38800000u) return sign | (bits(from_bits(mag) + 0.5f) - 0x3f000000u);
    return sign | (mag + 0xfffu + (mag >> 13 & 1u) - 0x38000000u) >> 13;
  }

  static void load_halves(const uint16_t* p, F x[8]) {
    for (int e = 0; e < 8; ++e) x[e] = from_half(p[e]);
  }
  static void store_halves(uint16_t* p, const F x[8]) {
    for (int e = 0; e < 8; ++e) p[e] = static_cast<uint16_t>(to_half(x[e]));
  }

  static void load_byte_pairs(const uint8_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i) w[i] = p[2 * i] | p[2 * i + 1] << 8;
  }
  static void store_byte_pairs(uint8_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i) {
      p[2 * i] = static_cast<uint8_t>(w[i]);
      p[2 * i + 1] = static_cast<uint8_t>(w[i] >> 8);
    }
  }
  static U mask_bits(const uint8_t* bytes, int i) { return static_cast<U>(bytes[0]) << (30 - 2 * i); }

  static void stream(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
  static void stream_end() {}
  static U pack_bf16(U b0, U b1) { return high_halves(bf16_nearest(b0), bf16_nearest(b1)); }

  static void plus_minus(const uint32_t* signs, int vec, int i, F c, F& c0, F& c1) {
    const uint32_t byte = *signs >> 8 * (vec & 3);
    c0 = signed_coefficient(byte, 2 * i, c);
    c1 = signed_coefficient(byte, 2 * i + 1, c);
  }
};

}  // namespace zk::cpu
