// Eight parameters at a time between memory and fp32 registers. The device converts by instruction; the host
// branch is for tests/cuda_on_host, which runs the kernels' code on the CPU.
#pragma once

#include "../cpu/lanes_portable.h"
#include "../noise/integers.h"
#include "../noise/rounding.h"
#include "../noise/wire.h"
#include "table.h"

namespace zk::cuda {

struct alignas(16) Vec16 {
  uint32_t w[4];
};

// NVIDIA's arithmetic makes one NaN only, 0x7fffffff. An addition to its bits would make a number of it, so
// its low half is set to zeros here. Nothing else changes: as signed integers all numbers and infinities are
// smaller. A host's arithmetic also passes on the NaNs of its operands, of either sign.
ZK_HD uint32_t tame_nan(uint32_t b) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(static_cast<int32_t>(b) < 0x7fff0000 ? static_cast<int32_t>(b) : 0x7fff0000);
#else
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : b;
#endif
}

// sum + (w & 0xffff) in one instruction, but of the pipe that multiplies; before sm_86 that pipe is the
// busiest. For w >> 16 this is not needed, because an addition includes the shift.
ZK_HD uint32_t add_low_half(uint32_t sum, uint32_t w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  asm("dp2a.lo.u32.u32 %0, %1, 1, %0;" : "+r"(sum) : "r"(w));
  return sum;
#else
  return sum + (w & 0xffffu);
#endif
}

template <DType D>
struct Storage;

template <>
struct Storage<DType::f32> {
  using T = float;
  struct Raw {
    Vec16 v[2];
  };
  static ZK_HD void unpack(const Raw& raw, float x[8]) {
    for (int i = 0; i < 8; ++i) x[i] = from_bits(raw.v[i / 4].w[i % 4]);
  }
  template <bool Stochastic>
  static ZK_HD Raw pack(const float x[8], const Words<uint32_t>&) {
    Raw raw;
    for (int i = 0; i < 8; ++i) raw.v[i / 4].w[i % 4] = bits(x[i]);
    return raw;
  }
};

template <>
struct Storage<DType::bf16> {
  using T = uint16_t;
  struct Raw {
    Vec16 v[1];
  };
  static ZK_HD uint32_t nearest(float x0, float x1) {
#if defined(__CUDA_ARCH__)
    uint32_t w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x1), "f"(x0));
    return w;
#else
    return bf16_nearest(tame_nan(bits(x0))) >> 16 | (bf16_nearest(tame_nan(bits(x1))) & 0xffff0000u);
#endif
  }
  static ZK_HD void unpack(const Raw& raw, float x[8]) {
    for (int p = 0; p < 4; ++p) {
      x[2 * p] = from_bits(raw.v[0].w[p] << 16);
      x[2 * p + 1] = from_bits(raw.v[0].w[p] & 0xffff0000u);
    }
  }
  template <bool Stochastic>
  static ZK_HD Raw pack(const float x[8], const Words<uint32_t>& random) {
    Raw raw;
    for (int p = 0; p < 4; ++p) {
      if constexpr (Stochastic) {
        const uint32_t low = add_low_half(tame_nan(bits(x[2 * p])), random.w[p]);
        const uint32_t high = tame_nan(bits(x[2 * p + 1])) + (random.w[p] >> 16);
        raw.v[0].w[p] = high_halves(low, high);
      } else {
        raw.v[0].w[p] = nearest(x[2 * p], x[2 * p + 1]);
      }
    }
    return raw;
  }
};

template <>
struct Storage<DType::f16> {
  using T = uint16_t;
  struct Raw {
    Vec16 v[1];
  };
  static ZK_HD float stochastic(float x, uint32_t u16) {
    return from_bits(pass_special(bits(x), bits(half_stochastic(x, u16))));
  }
  static ZK_HD uint32_t nearest(float x0, float x1) {
#if defined(__CUDA_ARCH__)
    uint32_t w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x1), "f"(x0));
    return w;
#else
    return cpu::Portable::to_half(x0) | cpu::Portable::to_half(x1) << 16;
#endif
  }
  static ZK_HD void unpack(const Raw& raw, float x[8]) {
    for (int p = 0; p < 4; ++p) {
#if defined(__CUDA_ARCH__)
      asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
          : "=f"(x[2 * p]), "=f"(x[2 * p + 1])
          : "r"(raw.v[0].w[p]));
#else
      x[2 * p] = cpu::Portable::from_half(raw.v[0].w[p] & 0xffffu);
      x[2 * p + 1] = cpu::Portable::from_half(raw.v[0].w[p] >> 16);
#endif
    }
  }
  template <bool Stochastic>
  static ZK_HD Raw pack(const float x[8], const Words<uint32_t>& random) {
    Raw raw;
    for (int p = 0; p < 4; ++p) {
      raw.v[0].w[p] = Stochastic ? nearest(stochastic(x[2 * p], random.w[p] & 0xffffu),
                                           stochastic(x[2 * p + 1], random.w[p] >> 16))
                                 : nearest(x[2 * p], x[2 * p + 1]);
    }
    return raw;
  }
};

template <>
struct Storage<DType::i8> {
  using T = int8_t;
  struct alignas(8) Raw {
    uint32_t w[2];
  };
  static ZK_HD void unpack(const Raw& raw, float x[8]) {
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(static_cast<int8_t>(raw.w[i / 4] >> 8 * (i % 4)));
  }
  template <bool Stochastic>
  static ZK_HD Raw pack(const float x[8], const Words<uint32_t>& random, float low, float high) {
    Raw raw{};
    for (int i = 0; i < 8; ++i) {
      const float clamped = clamp(x[i], low, high);
      uint32_t q;
      if constexpr (Stochastic) {
        q = integer_stochastic(clamped, random.w[i / 2] >> 16 * (i % 2) & 0xffffu);
      } else {
        q = nearest_int(clamped);
      }
      raw.w[i / 4] |= (q & 0xffu) << 8 * (i % 4);
    }
    return raw;
  }
};

// The codes of wire buffers, without their scales.
template <>
struct Storage<DType::e4m3> {
  using T = uint8_t;
  using Raw = Storage<DType::i8>::Raw;
  static ZK_HD void unpack(const Raw& raw, float x[8]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    for (int p = 0; p < 4; ++p) {
      const auto two = static_cast<uint16_t>(raw.w[p / 2] >> 16 * (p % 2));
      asm("{.reg .b32 h; .reg .b16 l, u; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {l, u}, h; cvt.f32.f16 %0, l; cvt.f32.f16 %1, u;}"
          : "=f"(x[2 * p]), "=f"(x[2 * p + 1])
          : "h"(two));
    }
#else
    for (int i = 0; i < 8; ++i) x[i] = e4m3_value(raw.w[i / 4] >> 8 * (i % 4) & 0xffu);
#endif
  }
};

}  // namespace zk::cuda
