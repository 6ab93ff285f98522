// combine on the device: theta = round(decay * theta + sum c_k z_k), many tensors in one launch.
#pragma once

#include "combine.h"
#include "device.cuh"

namespace zk::cuda {

// What is done with the sum: it is rounded once and stored, and a fan-out starts from the rounded value.
// probe(sign, from, to) computes to = from + sign * c * z, where c and z are those of the fan-out's
// direction.
template <DType D, bool Round, bool FanOut, class Access, class Probe>
ZK_DEVICE void finish(const CombineShared& p, const CombineEntry& t, const Access& at, float acc[kVector],
                      const Words<uint32_t>& random, const Probe& probe) {
  using S = Storage<D>;
  const auto raw = S::template pack<Round>(acc, random);
  if constexpr (!FanOut) {
    at.template store<D>(t.out, raw);
  } else {
    if (p.count > 0 || p.decay != nullptr) at.template store<D>(t.out, raw);  // something was pending
    S::unpack(raw, acc);
    float side[kVector];
    probe(1.0f, acc, side);
    at.template store<D>(t.plus, S::template pack<false>(side, random));
    probe(-1.0f, acc, side);
    at.template store<D>(t.minus, S::template pack<false>(side, random));
  }
}

// Whether every pointer of the tensor and its logical offset allow 16-byte accesses of whole blocks.
template <DType D, bool FanOut>
ZK_DEVICE bool allows_vectors(const CombineEntry& t) {
  uint64_t all = address(t.in) | address(t.out);
  if constexpr (FanOut) all |= address(t.plus) | address(t.minus);
  return is_aligned<D>(all, t.offset);
}

template <bool Decay>
ZK_DEVICE void apply_decay(const CombineShared& p, float decay, float acc[kVector]) {
  if constexpr (Decay) {
    if (p.decay != nullptr) {
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[e] = mul(decay, acc[e]);
    }
  }
}

template <DType D, int K, bool Decay, bool Stochastic, int Bytes, bool FanOut>
ZK_GLOBAL combine_normal_kernel(ZK_GRID_CONSTANT CombineLaunch<Bytes> p) {
  using S = Storage<D>;
  constexpr bool kRound = Stochastic && D != DType::f32;
  const int i = tensor_of(p.table, blockIdx.x);
  const CombineEntry& t = p.table.tensor[i];
  const Stream stream = p.table.stream[i];

  const uint64_t chunk = blockIdx.x - p.table.first_chunk[i];
  const uint64_t start = t.offset / kVector * kVector + chunk * kNormalChunk;  // logical
  const int64_t position = static_cast<int64_t>(start - t.offset);
  const uint64_t block = start / kVector;

  const int count = K > 0 ? K : p.count;
  constexpr int kKept = K > 0 ? K : 1;
  PhiloxKey key[kKept];
  float coeff[kKept];
  if constexpr (K > 0) {
    ZK_UNROLL
    for (int k = 0; k < K; ++k) {
      key[k] = philox_key(seed_at(p.seeds, k));
      coeff[k] = p.coeffs[k];
    }
  }
  PhiloxKey rounding{}, probe_key{};
  if constexpr (kRound) rounding = philox_key(seed_at(p.rounding_seed, 0));
  if constexpr (FanOut) probe_key = philox_key(seed_at(p.probe_seed, 0));
  float decay = 1.0f;
  if constexpr (Decay) decay = p.decay != nullptr ? *p.decay : 1.0f;

  const auto block_of_eight = [&](uint64_t b, const auto& at, const typename S::Raw& raw) {
    float acc[kVector];
    S::unpack(raw, acc);
    apply_decay<Decay>(p, decay, acc);
    const auto direction = [&](const PhiloxKey& k, float c) {
      float z[kVector];
      normals(draw(k, b, stream, kNormal), z, p.mantissa);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[e] = fma(c, z[e], acc[e]);
    };
    if constexpr (K > 0) {
      ZK_UNROLL
      for (int k = 0; k < K; ++k) direction(key[k], coeff[k]);
    } else {
      for (int k = 0; k < count; ++k) direction(philox_key(seed_at(p.seeds, k)), p.coeffs[k]);
    }
    Words<uint32_t> random{};
    if constexpr (kRound) random = draw(rounding, b, stream, kRounding);
    float z[kVector];
    if constexpr (FanOut) normals(draw(probe_key, b, stream, kNormal), z, p.mantissa);
    finish<D, kRound, FanOut>(p, t, at, acc, random,
                              [&](float sign, const float from[kVector], float to[kVector]) {
      const float c = mul(sign, *p.probe_coeff);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) to[e] = fma(c, z[e], from[e]);
    });
  };

  const bool inside = position >= 0 && position + kNormalChunk <= t.numel;
  // Where the low word of the counter wraps inside the chunk, the upper word differs between threads. That is
  // left to the slow path.
  const bool wraps = static_cast<uint32_t>(block) > 0xffffffffu - kThreads * kSteps;
  if (inside && allows_vectors<D, FanOut>(t) && !wraps) {
    const auto access = [&](int s) {
      return VectorAccess{position + static_cast<int64_t>(threadIdx.x) * kVector, s * kThreads};
    };
    // How many loads are in flight. A fan-out that rounds holds the keys of three seeds, and with four loads
    // it would spill registers.
    constexpr int kFlight = FanOut && kRound ? 2 : 4;
    ZK_NO_UNROLL
    for (int first = 0; first < kSteps; first += kFlight) {
      typename S::Raw raw[kFlight];
      ZK_UNROLL
      for (int s = 0; s < kFlight; ++s) raw[s] = access(first + s).template load<D>(t.in);
      ZK_UNROLL
      for (int s = 0; s < kFlight; ++s) {
        // The sum cannot carry into the upper word. Written in this way, the compiler knows it.
        const uint32_t low = static_cast<uint32_t>(block) + threadIdx.x + (first + s) * kThreads;
        block_of_eight((block & 0xffffffff00000000u) | low, access(first + s), raw[s]);
      }
    }
  } else {
    ZK_NO_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int64_t v = threadIdx.x + s * kThreads;
      const EdgeAccess at{position + v * kVector, t.numel};
      if (at.first >= t.numel) break;
      block_of_eight(block + v, at, at.template load<D>(t.in));
    }
  }
}

template <DType D, int K, bool Decay, bool Stochastic, int Bytes, bool FanOut>
ZK_GLOBAL combine_rademacher_kernel(ZK_GRID_CONSTANT CombineLaunch<Bytes> p) {
  using S = Storage<D>;
  constexpr bool kRound = Stochastic && D != DType::f32;
  constexpr int kBytes = kRademacherTile / kVector / kRademacherBlocks;  // a lane has 16 vecs
  const int i = tensor_of(p.table, blockIdx.x);
  const CombineEntry& t = p.table.tensor[i];
  const Stream stream = p.table.stream[i];

  const uint64_t chunk = blockIdx.x - p.table.first_chunk[i];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t start = t.offset / kRademacherTile * kRademacherTile + chunk * kRademacherChunk +
                         warp * kRademacherTile;
  const int64_t position = static_cast<int64_t>(start - t.offset);
  if (position >= t.numel) return;
  const uint64_t block = start / kRademacherTile * kRademacherBlocks + lane;
  const auto sign_words = [&](const int64_t* seeds, int k) {
    return draw(philox_key(seed_at(seeds, k)), block, stream, kRademacher);
  };

  const int count = K > 0 ? K : p.count;
  constexpr int kKept = K > 0 ? K : 1;
  Words<uint32_t> signs[kKept], probe_signs{};
  float coeff[kKept];
  if constexpr (K > 0) {
    ZK_UNROLL
    for (int k = 0; k < K; ++k) {
      signs[k] = sign_words(p.seeds, k);
      coeff[k] = p.coeffs[k];
    }
  }
  if constexpr (FanOut) probe_signs = sign_words(p.probe_seed, 0);
  PhiloxKey rounding{};
  if constexpr (kRound) rounding = philox_key(seed_at(p.rounding_seed, 0));
  float decay = 1.0f;
  if constexpr (Decay) decay = p.decay != nullptr ? *p.decay : 1.0f;

  // The contract has fma(c, +-1, from), which is from +- c.
  const auto direction = [&](const Words<uint32_t>& w, float c, int byte, const float from[kVector],
                             float to[kVector]) {
    const uint32_t word = word_of(w, byte) >> (8 * (byte % 4));
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) to[e] = add(from[e], signed_coefficient(word, e, c));
  };
  const auto vec_end = [&](int byte, const auto& at, float acc[kVector]) {
    Words<uint32_t> random{};
    if constexpr (kRound) random = draw(rounding, start / kVector + 32 * byte + lane, stream, kRounding);
    finish<D, kRound, FanOut>(p, t, at, acc, random,
                              [&](float sign, const float from[kVector], float to[kVector]) {
      direction(probe_signs, mul(sign, *p.probe_coeff), byte, from, to);
    });
  };
  // A group of vecs is done at a time. For any number of directions a group is four of a block's sixteen
  // vecs, so that the sums of no more than four are held in registers. The block is then drawn four times,
  // which costs 37 instructions for 32 elements each time.
  constexpr int kGroup = 4;
  const auto accumulate = [&](int group, float acc[kGroup][kVector]) {
    ZK_UNROLL
    for (int v = 0; v < kGroup; ++v) apply_decay<Decay>(p, decay, acc[v]);
    if constexpr (K > 0) {
      ZK_UNROLL
      for (int k = 0; k < K; ++k) {
        ZK_UNROLL
        for (int v = 0; v < kGroup; ++v) direction(signs[k], coeff[k], group * kGroup + v, acc[v], acc[v]);
      }
    } else {
      for (int k = 0; k < count; ++k) {
        const Words<uint32_t> w = sign_words(p.seeds, k);
        ZK_UNROLL
        for (int v = 0; v < kGroup; ++v) direction(w, p.coeffs[k], group * kGroup + v, acc[v], acc[v]);
      }
    }
  };

  if (position >= 0 && position + kRademacherTile <= t.numel && allows_vectors<D, FanOut>(t)) {
    const auto access = [&](int byte) {
      return VectorAccess{position + static_cast<int64_t>(lane) * kVector, 32 * byte};
    };
    ZK_UNROLL
    for (int group = 0; group < kBytes / kGroup; ++group) {
      typename S::Raw raw[kGroup];
      float acc[kGroup][kVector];
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) raw[v] = access(group * kGroup + v).template load<D>(t.in);
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) S::unpack(raw[v], acc[v]);
      accumulate(group, acc);
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) vec_end(group * kGroup + v, access(group * kGroup + v), acc[v]);
    }
  } else {
    ZK_NO_UNROLL
    for (int byte = 0; byte < kBytes; ++byte) {
      const EdgeAccess at{position + (32 * byte + static_cast<int64_t>(lane)) * kVector, t.numel};
      float acc[kVector];
      S::unpack(at.template load<D>(t.in), acc);
      apply_decay<Decay>(p, decay, acc);
      if constexpr (K > 0) {
        ZK_UNROLL
        for (int k = 0; k < K; ++k) direction(signs[k], coeff[k], byte, acc, acc);
      } else {
        for (int k = 0; k < count; ++k) direction(sign_words(p.seeds, k), p.coeffs[k], byte, acc, acc);
      }
      vec_end(byte, at, acc);
    }
  }
}

}  // namespace zk::cuda
