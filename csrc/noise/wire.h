// Wire formats with scales (zokernels/wire.py): MXFP8 E4M3 and MXINT8 of the OCP Microscaling specification
// v1.0.
#pragma once

#include "integers.h"
#include "rounding.h"

namespace zk {

constexpr int kWireBlock = 32;       // so many elements share a scale
constexpr int64_t kWireAlign = 256;  // the scales of a buffer begin at a multiple of this many bytes
constexpr uint32_t kFp8Emax = 8, kInt8Emax = 0;

ZK_HD constexpr int64_t wire_scale_begin(int64_t numel) {
  return (numel + kWireAlign - 1) / kWireAlign * kWireAlign;
}
ZK_HD constexpr int64_t wire_blocks(int64_t numel, uint64_t offset) {
  return numel == 0 ? 0 : static_cast<int64_t>((offset + numel - 1) / kWireBlock - offset / kWireBlock) + 1;
}

// The scale 2^(s - 127) of the byte s, and NaN for 255. 2^-127 (s = 0) is subnormal: its exponent field is 0,
// and the 1 stands in the highest place below that field.
ZK_HD float wire_scale(uint32_t s) { return from_bits(s << 23 | (s == 0 || s == 255 ? 0x00400000u : 0u)); }

// The scale byte of a block whose largest magnitude has the bits `top`.
ZK_HD uint32_t wire_scale_byte(uint32_t top, uint32_t emax) {
  const uint32_t e = top >> 23;
  return e == 255 ? 255 : e > emax ? e - emax : 0;
}

// The value of an E4M3 code, without its scale. The caller passes the seven low bits in bits 20 to 26, and
// the sign in bit 31. Read as fp32, that is the value with an exponent that is 120 too small, also for
// subnormals.
template <class U>
ZK_HD auto e4m3_value(U rest, U sign) {
  const U b = select_ge(rest, 0x07f00000u, Splat<U>::of(0x7fc00000u), rest | sign);
  return mul(from_bits(b), Splat<decltype(from_bits(b))>::of(0x1p120f));
}
ZK_HD float e4m3_value(uint32_t code) {
  return e4m3_value((code << 20) & 0x07f00000u, (code << 24) & 0x80000000u);
}

// fp32 to the nearest E4M3 code, ties to even. Values beyond the largest number, 448, become that number.
ZK_HD uint32_t e4m3_code(float x) {
  const uint32_t b = bits(x);
  const uint32_t mag = magnitude(b) < 0x43e00000u ? magnitude(b) : 0x43e00000u;
  const uint32_t normal = (mag + 0x7ffffu + (mag >> 20 & 1u)) >> 20;
  // Below 2^-6 numbers are multiples of 2^-9, the subnormal unit; adding 2^14 rounds to such a multiple.
  const uint32_t tiny = bits(add(from_bits(mag), 16384.0f)) - 0x46800000u;
  return (b >> 24 & 0x80u) | (mag < 0x3c800000u ? tiny : normal - (120u << 3));
}

// x in units of 2^-6 as a byte in two's complement.
ZK_HD uint32_t int8_code(float x) { return nearest_int(clamp(mul(x, 64.0f), -127.0f, 127.0f)) & 0xffu; }

// fp32 bits in which a finite value that is too large for fp16 has become the largest fp16.
ZK_HD uint32_t saturated_half(uint32_t b) {
  const uint32_t mag = magnitude(b);
  return mag > 0x477fe000u && mag < kInfinity ? (b & 0x80000000u) | 0x477fe000u : b;
}

}  // namespace zk
