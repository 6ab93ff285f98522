// The vocabulary in which contract zk1 is written: operations on lanes of 32 bits.
//
// Here for one lane (float, uint32_t), on the host and on the device. csrc/cpu/lanes_*.h has the same
// functions for SIMD registers, so that philox.h, normal.h and rounding.h exist once.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ZK_HD __host__ __device__ __forceinline__
#else
#define ZK_HD inline __attribute__((always_inline))
#define ZK_INLINE __attribute__((always_inline))  // of a lambda
#endif

namespace zk {

// One lane: F is fp32, U its 32 bits, C a Philox counter word.
struct Scalar {
  using F = float;
  using U = uint32_t;
  using C = uint32_t;
  static constexpr int width = 1;
};

template <class V>
struct Splat;  // Splat<V>::of(scalar): the scalar in every lane of V
template <>
struct Splat<float> {
  static ZK_HD float of(float x) { return x; }
};
template <>
struct Splat<uint32_t> {
  static ZK_HD uint32_t of(uint32_t x) { return x; }
};

ZK_HD uint32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

ZK_HD float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

// IEEE fp32 operations that no compiler may fuse, reorder or flush: on the device by intrinsic, on the host
// by -ffp-contract=off.
ZK_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ZK_HD float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ZK_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// sqrt(s) from y, an approximation of 1 / sqrt(s). These are the instructions of the compiler's own
// sqrt.rn.f32 without its range check and slow path. With rsqrt.approx as y they are correctly rounded for s
// >= 2^-100; the normal transform gives s in [4.5e-7, 43] (tests/test_cuda.py; on a device,
// tests/gpu/check_math.cu).
ZK_HD float sqrt_from_rsqrt(float s, float y) {
  const float g = mul(s, y);
  const float h = mul(0.5f, y);
  return fma(fma(-g, g, s), h, g);
}

ZK_HD float sqrt(float s) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(s));
  return sqrt_from_rsqrt(s, y);
#else
  return __builtin_sqrtf(s);
#endif
}

ZK_HD float signed_to_float(uint32_t u) { return static_cast<float>(static_cast<int32_t>(u)); }
ZK_HD float low_half_to_float(uint32_t u) { return static_cast<float>(static_cast<int16_t>(u & 0xffffu)); }

ZK_HD uint32_t select_ge(uint32_t a, uint32_t threshold, uint32_t yes, uint32_t no) {
  return a >= threshold ? yes : no;
}

// Three-input logic: one instruction (LOP3, vpternlog) where the machine has it.
ZK_HD uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
ZK_HD uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
ZK_HD uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

ZK_HD void mul_wide(uint32_t c, uint32_t m, uint32_t& hi, uint32_t& lo) {
  const uint64_t p = static_cast<uint64_t>(c) * m;
  hi = static_cast<uint32_t>(p >> 32);
  lo = static_cast<uint32_t>(p);
}

// The four counter words after the last round as words of noise, in memory order where there are more lanes
// than one.
ZK_HD void join(const uint32_t x[4], uint32_t w[4]) {
  for (int i = 0; i < 4; ++i) w[i] = x[i];
}

// The words of the same block that follow those of register i, cyclically.
ZK_HD uint32_t next_word(const uint32_t w[4], int i) { return w[(i + 1) & 3]; }

// Of any value, where `sqrt` takes those of the normal transform.
ZK_HD float sqrt_full(float s) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(s);
#else
  return __builtin_sqrtf(s);
#endif
}

ZK_HD float div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// yes where the top bit of a is set.
ZK_HD float select_top(uint32_t a, float yes, float no) { return static_cast<int32_t>(a) < 0 ? yes : no; }

// min(max(x, low), high), low for NaN.
ZK_HD float clamp(float x, float low, float high) {
  const float above = x > low ? x : low;
  return above < high ? above : high;
}

// Small values to integers: to nearest even, and downward.
ZK_HD uint32_t nearest_int(float x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__float2int_rn(x));
#else
  return static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(x)));
#endif
}

ZK_HD uint32_t floor_int(float x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__float2int_rd(x));
#else
  return static_cast<uint32_t>(static_cast<int32_t>(__builtin_floorf(x)));
#endif
}

}  // namespace zk
