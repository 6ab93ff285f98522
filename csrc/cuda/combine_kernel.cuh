// combine on the device: theta = round(decay * theta + sum c_k z_k), many tensors in one launch.
//
// A thread owns whole Philox blocks: eight elements, one 16-byte access in half precision, no output thrown away. Chunks
// that lie inside their tensor and are aligned take the fast path; the rest (first and last chunk of a tensor, shards that
// start inside a block) goes element by element through the same arithmetic.
//
// Threads neither communicate nor synchronise, so tests/cuda_on_host runs this file on the CPU, thread by thread.
#pragma once

#include "../noise/normal.h"
#include "../noise/rademacher.h"
#include "combine.h"
#include "storage.cuh"

#if defined(__CUDACC__)
#define ZK_DEVICE __device__ __forceinline__
#define ZK_GLOBAL __global__ void __launch_bounds__(zk::cuda::kThreads)
#define ZK_GRID_CONSTANT const __grid_constant__
#define ZK_UNROLL _Pragma("unroll")
#define ZK_NO_UNROLL _Pragma("unroll 1")
#else
#define ZK_DEVICE inline
#define ZK_GLOBAL void
#define ZK_GRID_CONSTANT const
#define ZK_UNROLL
#define ZK_NO_UNROLL
#endif

namespace zk::cuda {

ZK_DEVICE uint64_t seed_at(const int64_t* seeds, int k) { return static_cast<uint64_t>(seeds[k]); }

ZK_DEVICE Words<uint32_t> draw(const PhiloxKey& key, uint64_t block, uint32_t stream, Domain domain) {
  return philox<Scalar>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, domain, key);
}

// Word byte / 4, without indexing registers by a variable, which would move them to memory.
ZK_DEVICE uint32_t word_of(const Words<uint32_t>& x, int byte) {
  const uint32_t low = byte & 4 ? x.w[1] : x.w[0], high = byte & 4 ? x.w[3] : x.w[2];
  return byte & 8 ? high : low;
}

// The tensor whose chunks include `chunk`. The index is the same in all threads, so the table is read as constants.
ZK_DEVICE int tensor_of(const CombineLaunch& p, uint32_t chunk) {
  int low = 0, high = p.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Eight elements whose positions start at `first` and may lie in part outside [0, numel).
template <DType D, bool Stochastic, class Accumulate>
ZK_DEVICE void edge_vector(const typename Storage<D>::T* in, typename Storage<D>::T* out, int64_t first, int64_t numel,
                           const Words<uint32_t>& random, const Accumulate& accumulate) {
  using T = typename Storage<D>::T;
  union {
    typename Storage<D>::Raw raw;
    T element[kVector];
  } buffer;
  ZK_UNROLL
  for (int e = 0; e < kVector; ++e) buffer.element[e] = first + e >= 0 && first + e < numel ? in[first + e] : T{};
  float acc[kVector];
  Storage<D>::unpack(buffer.raw, acc);
  accumulate(acc);
  buffer.raw = Storage<D>::template pack<Stochastic>(acc, random);
  ZK_UNROLL
  for (int e = 0; e < kVector; ++e) {
    if (first + e >= 0 && first + e < numel) out[first + e] = buffer.element[e];
  }
}

template <bool Decay>
ZK_DEVICE void apply_decay(const CombineLaunch& p, float decay, float acc[kVector]) {
  if constexpr (Decay) {
    if (p.decay != nullptr) {
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[e] = mul(decay, acc[e]);
    }
  }
}

template <DType D, int K, bool Decay, bool Stochastic>
ZK_GLOBAL combine_normal_kernel(ZK_GRID_CONSTANT CombineLaunch p) {
  using S = Storage<D>;
  using T = typename S::T;
  constexpr bool kRound = Stochastic && D != DType::f32;
  const int i = tensor_of(p, blockIdx.x);
  const TensorEntry& t = p.tensor[i];
  const uint32_t stream = p.stream[i];
  const T* in = static_cast<const T*>(t.in);
  T* out = static_cast<T*>(t.out);

  const uint64_t chunk = blockIdx.x - p.first_chunk[i];
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
  PhiloxKey rounding{};
  if constexpr (kRound) rounding = philox_key(seed_at(p.rounding_seed, 0));
  float decay = 1.0f;
  if constexpr (Decay) decay = p.decay != nullptr ? *p.decay : 1.0f;

  const auto accumulate = [&](uint64_t b, float acc[kVector]) {
    apply_decay<Decay>(p, decay, acc);
    const auto direction = [&](const PhiloxKey& k, float c) {
      float z[kVector];
      normal8(draw(k, b, stream, kNormal), z, p.mantissa);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[e] = fma(c, z[e], acc[e]);
    };
    if constexpr (K > 0) {
      ZK_UNROLL
      for (int k = 0; k < K; ++k) direction(key[k], coeff[k]);
    } else {
      for (int k = 0; k < count; ++k) direction(philox_key(seed_at(p.seeds, k)), p.coeffs[k]);
    }
  };

  const bool inside = position >= 0 && position + kNormalChunk <= t.numel;
  const bool aligned = ((reinterpret_cast<uint64_t>(in) | reinterpret_cast<uint64_t>(out)) % 16 | t.offset % kVector) == 0;
  // Where the low counter word wraps inside the chunk, the upper word differs between threads: left to the slow path.
  const bool wraps = static_cast<uint32_t>(block) > 0xffffffffu - kThreads * kSteps;
  if (inside && aligned && !wraps) {
    using Raw = typename S::Raw;
    const Raw* src = reinterpret_cast<const Raw*>(in + position) + threadIdx.x;
    Raw* dst = reinterpret_cast<Raw*>(out + position) + threadIdx.x;
    Raw raw[kSteps];
    ZK_UNROLL
    for (int s = 0; s < kSteps; ++s) raw[s] = src[s * kThreads];
    ZK_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      // The sum cannot carry into the upper word, and written so the compiler knows.
      const uint32_t low = static_cast<uint32_t>(block) + threadIdx.x + s * kThreads;
      const uint64_t b = (block & 0xffffffff00000000u) | low;
      float acc[kVector];
      S::unpack(raw[s], acc);
      accumulate(b, acc);
      Words<uint32_t> random{};
      if constexpr (kRound) random = draw(rounding, b, stream, kRounding);
      dst[s * kThreads] = S::template pack<kRound>(acc, random);
    }
  } else {
    ZK_NO_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int64_t v = threadIdx.x + s * kThreads;
      const int64_t first = position + v * kVector;
      if (first >= t.numel) break;
      const uint64_t b = block + v;
      Words<uint32_t> random{};
      if constexpr (kRound) random = draw(rounding, b, stream, kRounding);
      edge_vector<D, kRound>(in, out, first, t.numel, random, [&](float acc[kVector]) { accumulate(b, acc); });
    }
  }
}

template <DType D, int K, bool Decay, bool Stochastic>
ZK_GLOBAL combine_rademacher_kernel(ZK_GRID_CONSTANT CombineLaunch p) {
  using S = Storage<D>;
  using T = typename S::T;
  constexpr bool kRound = Stochastic && D != DType::f32;
  constexpr int kBytes = kRademacherTile / kVector / kRademacherBlocks;  // vecs of a lane: 16
  const int i = tensor_of(p, blockIdx.x);
  const TensorEntry& t = p.tensor[i];
  const uint32_t stream = p.stream[i];
  const T* in = static_cast<const T*>(t.in);
  T* out = static_cast<T*>(t.out);

  const uint64_t chunk = blockIdx.x - p.first_chunk[i];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t start = t.offset / kRademacherTile * kRademacherTile + chunk * kRademacherChunk + warp * kRademacherTile;
  const int64_t position = static_cast<int64_t>(start - t.offset);
  if (position >= t.numel) return;
  const uint64_t block = start / kRademacherTile * kRademacherBlocks + lane;

  const int count = K > 0 ? K : p.count;
  constexpr int kKept = K > 0 ? K : 1;
  Words<uint32_t> signs[kKept];
  float coeff[kKept];
  if constexpr (K > 0) {
    ZK_UNROLL
    for (int k = 0; k < K; ++k) {
      signs[k] = draw(philox_key(seed_at(p.seeds, k)), block, stream, kRademacher);
      coeff[k] = p.coeffs[k];
    }
  }
  PhiloxKey rounding{};
  if constexpr (kRound) rounding = philox_key(seed_at(p.rounding_seed, 0));
  float decay = 1.0f;
  if constexpr (Decay) decay = p.decay != nullptr ? *p.decay : 1.0f;

  // fma(c, +-1, acc) is acc +- c.
  const auto direction = [&](const Words<uint32_t>& w, float c, int byte, float acc[kVector]) {
    const uint32_t word = word_of(w, byte) >> (8 * (byte % 4));
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) acc[e] = add(acc[e], signed_coefficient(word, e, c));
  };
  const auto rounding_words = [&](int byte) {
    Words<uint32_t> random{};
    if constexpr (kRound) random = draw(rounding, start / kVector + 32 * byte + lane, stream, kRounding);
    return random;
  };
  // A group of vecs at a time: with any number of directions, a block is drawn anew for every four vecs of its sixteen
  // (37 instructions over 32 elements), so that no more than four vecs of sums are held.
  constexpr int kGroup = 4;
  const auto accumulate = [&](int group, float acc[kGroup][kVector]) {
    ZK_UNROLL
    for (int v = 0; v < kGroup; ++v) apply_decay<Decay>(p, decay, acc[v]);
    if constexpr (K > 0) {
      ZK_UNROLL
      for (int k = 0; k < K; ++k) {
        ZK_UNROLL
        for (int v = 0; v < kGroup; ++v) direction(signs[k], coeff[k], group * kGroup + v, acc[v]);
      }
    } else {
      for (int k = 0; k < count; ++k) {
        const Words<uint32_t> w = draw(philox_key(seed_at(p.seeds, k)), block, stream, kRademacher);
        ZK_UNROLL
        for (int v = 0; v < kGroup; ++v) direction(w, p.coeffs[k], group * kGroup + v, acc[v]);
      }
    }
  };

  const bool inside = position >= 0 && position + kRademacherTile <= t.numel;
  const bool aligned = ((reinterpret_cast<uint64_t>(in) | reinterpret_cast<uint64_t>(out)) % 16 | t.offset % kVector) == 0;
  if (inside && aligned) {
    using Raw = typename S::Raw;
    const Raw* src = reinterpret_cast<const Raw*>(in + position) + lane;
    Raw* dst = reinterpret_cast<Raw*>(out + position) + lane;
    ZK_UNROLL
    for (int group = 0; group < kBytes / kGroup; ++group) {
      Raw raw[kGroup];
      float acc[kGroup][kVector];
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) raw[v] = src[32 * (group * kGroup + v)];
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) S::unpack(raw[v], acc[v]);
      accumulate(group, acc);
      ZK_UNROLL
      for (int v = 0; v < kGroup; ++v) {
        dst[32 * (group * kGroup + v)] = S::template pack<kRound>(acc[v], rounding_words(group * kGroup + v));
      }
    }
  } else {
    ZK_NO_UNROLL
    for (int byte = 0; byte < kBytes; ++byte) {
      const int64_t first = position + (32 * byte + static_cast<int64_t>(lane)) * kVector;
      edge_vector<D, kRound>(in, out, first, t.numel, rounding_words(byte), [&](float acc[kVector]) {
        apply_decay<Decay>(p, decay, acc);
        if constexpr (K > 0) {
          ZK_UNROLL
          for (int k = 0; k < K; ++k) direction(signs[k], coeff[k], byte, acc);
        } else {
          for (int k = 0; k < count; ++k) {
            direction(draw(philox_key(seed_at(p.seeds, k)), block, stream, kRademacher), p.coeffs[k], byte, acc);
          }
        }
      });
    }
  }
}

ZK_GLOBAL derive_seed_kernel(const int64_t* run_seed, const int64_t* step, const int64_t* k, int64_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) {
    out[i] = static_cast<int64_t>(derive_seed(static_cast<uint64_t>(run_seed[i]), static_cast<uint64_t>(step[i]),
                                              static_cast<uint32_t>(k[i])));
  }
}

}  // namespace zk::cuda
