// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
#pragma once

#include "lanes.h"

namespace zk {

enum Domain : uint32_t { kSeed = 0, kNormal = 1, kRademacher = 2, kMask = 3, kRounding = 4, kState = 5 };

constexpr int kPhiloxRounds = 10;

// The key of every round. They depend on the seed alone, so whoever draws many blocks computes them once.
struct PhiloxKey {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

ZK_HD PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    key.k0[r] = k0;
    key.k1[r] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return key;
}

// A stream has 56 bits: the low 32 are counter word 2, and the upper 24 stand above the domain in word 3.
// Both words are made once for a tensor, so that a draw costs what it would with 32 bits.
struct Stream {
  uint32_t low, high;  // high: shifted to its place

  Stream() = default;
  ZK_HD explicit Stream(uint64_t stream)
      : low(static_cast<uint32_t>(stream)), high(static_cast<uint32_t>(stream >> 32) << 8) {}
  ZK_HD uint32_t with(Domain domain) const { return high | domain; }
};

template <class U>
struct Words {
  U w[4];
};

// The generator's state between rounds. Constructed with the first two done; philox() does the others. A
// round is a chain of dependent instructions, so a SIMD kernel that has other work at hand does it in
// between.
template <class L>
struct PhiloxState {
  using C = typename L::C;
  static constexpr uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u;
  C x[4];

  // The lanes differ in c0 alone: the upper counter words are one value for all, so half of round 1 and of
  // round 2 is scalar work that a compiler hoists (37 instead of 40 multiply-and-xor instructions a block).
  // Word 3 after round 2 is one value too: it takes the key of round 3 here, which round() then leaves out.
  ZK_HD PhiloxState(C c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKey& key) {
    uint32_t u_hi, u_lo, u0_hi, u0_lo;
    C hi0, lo0, hi1, lo1;
    mul_wide(c2, m1, u_hi, u_lo);  // round 1
    mul_wide(c0, m0, hi0, lo0);
    mul_wide(u_hi ^ c1 ^ key.k0[0], m0, u0_hi, u0_lo);  // round 2
    mul_wide(hi0 ^ Splat<C>::of(c3 ^ key.k1[0]), m1, hi1, lo1);
    x[0] = hi1 ^ Splat<C>::of(u_lo ^ key.k0[1]);
    x[1] = lo1;
    x[2] = lo0 ^ Splat<C>::of(u0_hi ^ key.k1[1]);
    x[3] = Splat<C>::of(u0_lo ^ key.k1[2]);
  }

  ZK_HD void round(const PhiloxKey& key, int r) {
    C hi0, lo0, hi1, lo1;
    mul_wide(x[0], m0, hi0, lo0);
    mul_wide(x[2], m1, hi1, lo1);
    x[0] = xor3(hi1, x[1], Splat<C>::of(key.k0[r]));
    x[1] = lo1;
    x[2] = r == 2 ? hi0 ^ x[3] : xor3(hi0, x[3], Splat<C>::of(key.k1[r]));
    x[3] = lo0;
  }

  ZK_HD Words<typename L::U> words() const {
    Words<typename L::U> words;
    join(x, words.w);
    return words;
  }
};

template <class L>
ZK_HD Words<typename L::U> philox(typename L::C c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                  const PhiloxKey& key) {
  PhiloxState<L> state(c0, c1, c2, c3, key);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 8
#endif
  for (int r = 2; r < kPhiloxRounds; ++r) state.round(key, r);
  return state.words();
}

// Seed of direction k at a step of a run.
ZK_HD uint64_t derive_seed(uint64_t run_seed, uint64_t step, uint32_t k) {
  const Words<uint32_t> x = philox<Scalar>(static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), k,
                                           kSeed, philox_key(run_seed));
  return x.w[0] | static_cast<uint64_t>(x.w[1]) << 32;
}

}  // namespace zk
