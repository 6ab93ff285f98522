// The normals of a block on the device. From sm_100 on one instruction multiplies, or multiplies and adds,
// two fp32 numbers in neighbouring registers, each rounded as it would be alone, and takes one issue slot
// instead of two. Issue slots are what the kernels wait for there. Both halves of the fp32 pipe are taken, of
// which one multiplies integers, too: so the radii, which follow Philox, stay single, and what turns them
// into normals is done for two at a time.
#pragma once

#include "../noise/normal.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
#define ZK_PAIRS
#endif

#if defined(ZK_PAIRS)

#define ZK_PAIR __device__ __forceinline__

namespace zk {

// The vocabulary of noise/lanes.h, as far as it is needed, in two lanes.
struct FloatPair {
  float a, b;
};
struct WordPair {
  uint32_t a, b;
};

template <>
struct Splat<FloatPair> {
  static ZK_PAIR FloatPair of(float x) { return {x, x}; }
};

ZK_PAIR FloatPair low_half_to_float(WordPair x) { return {low_half_to_float(x.a), low_half_to_float(x.b)}; }

// Both lanes in one register of 64 bits, which is two neighbouring ones of 32.
ZK_PAIR uint64_t joined(FloatPair x) {
  uint64_t both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "f"(x.a), "f"(x.b));
  return both;
}
ZK_PAIR FloatPair parted(uint64_t both) {
  FloatPair x;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(x.a), "=f"(x.b) : "l"(both));
  return x;
}

ZK_PAIR FloatPair mul(FloatPair x, FloatPair y) {
  uint64_t both;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(both) : "l"(joined(x)), "l"(joined(y)));
  return parted(both);
}

ZK_PAIR FloatPair fma(FloatPair x, FloatPair y, FloatPair z) {
  uint64_t both;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(both) : "l"(joined(x)), "l"(joined(y)), "l"(joined(z)));
  return parted(both);
}

}  // namespace zk

#endif

namespace zk::cuda {

ZK_HD void normals(const Words<uint32_t>& words, float z[8], uint32_t mantissa) {
#if defined(ZK_PAIRS)
  uint32_t v[4];
  for (int p = 0; p < 4; ++p) v[p] = words.w[p] | 1u;
  for (int p = 0; p < 4; p += 2) {
    const FloatPair r{signed_radius<float>(v[p], mantissa), signed_radius<float>(v[p + 1], mantissa)};
    FloatPair even, odd;
    turn(r, WordPair{v[p + 1], v[(p + 2) & 3]}, even, odd);
    z[2 * p] = even.a;
    z[2 * p + 1] = odd.a;
    z[2 * p + 2] = even.b;
    z[2 * p + 3] = odd.b;
  }
#else
  normal8(words, z, mantissa);
#endif
}

}  // namespace zk::cuda
