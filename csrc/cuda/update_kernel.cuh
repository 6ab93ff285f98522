// The kernel of update, and of combine with masks, curvature or coefficients of each tensor's own. In it
// combine is a rule without a state.
//
// Whether there are masks, a decay and rounding, and the dtypes of states are tested at run time. All threads
// take the same branch, and to compile a kernel for each case would make hundreds of them.
#pragma once

#include <type_traits>

#include "../noise/masks.h"
#include "device.cuh"
#include "update.h"

namespace zk::cuda {

// combine as a rule: its sum starts from the decayed theta and not from 0.
struct Combine : rules::Gradient {
  static constexpr int states = 0, values = 0;
  static ZK_DEVICE float apply(const float*, const float*, const float sum[], float, float, float[]) {
    return sum[0];
  }
};

// combine with a curvature: every z is divided by its square root.
struct ScaledCombine : Combine {};

// Eight values of a state or of a curvature, which are fp32 or bf16.
struct StateVec {
  Storage<DType::f32>::Raw raw;  // bf16: in v[0]

  template <class Access>
  ZK_DEVICE void load(const Access& at, const void* p, bool is_bf16) {
    if (is_bf16) {
      raw.v[0] = at.template load<DType::bf16>(p).v[0];
    } else {
      raw = at.template load<DType::f32>(p);
    }
  }
  ZK_DEVICE void unpack(bool is_bf16, float x[kVector]) const {
    is_bf16 ? Storage<DType::bf16>::unpack({raw.v[0]}, x) : Storage<DType::f32>::unpack(raw, x);
  }
};

template <DType D, bool Stochastic, class Launch>
ZK_DEVICE typename Storage<D>::Raw pack(const Launch& p, const float x[kVector],
                                        const Words<uint32_t>& random) {
  if constexpr (D == DType::i8) {
    return Storage<D>::template pack<Stochastic>(x, random, p.low, p.high);
  } else {
    return Storage<D>::template pack<Stochastic>(x, random);
  }
}

template <Domain Dist>
ZK_DEVICE Tile<Dist> tile_at(const UpdateEntry& t, uint64_t chunk, Stream stream, uint32_t mantissa) {
  return {t.offset, chunk, stream, mantissa};
}

template <Domain Dist>
ZK_DEVICE RowTile<Dist> tile_at(const RowsEntry& t, uint64_t chunk, Stream stream, uint32_t mantissa) {
  return {t, chunk, stream, mantissa};
}

template <DType D, Domain Dist, class Rule, class Launch>
ZK_GLOBAL update_kernel(ZK_GRID_CONSTANT Launch p) {
  using S = Storage<D>;
  constexpr bool kCombines = std::is_base_of_v<Combine, Rule>, kScaled = std::is_same_v<Rule, ScaledCombine>;
  constexpr int kRead = kScaled ? 1 : Rule::states,
                kKept = kRead > 0 ? kRead : 1;  // an array cannot be empty
  const int i = tensor_of(p.table, blockIdx.x);
  const auto& t = p.table.tensor[i];
  const auto tile = tile_at<Dist>(t, blockIdx.x - p.table.first_chunk[i], p.table.stream[i], p.mantissa);
  if (tile.is_outside(t.numel)) return;
  const float decay = p.decay != nullptr ? *p.decay : 1.0f;  // a product with 1 changes no bit
  float hyper[Rule::values > 0 ? Rule::values : 1];
  ZK_UNROLL
  for (int h = 0; h < Rule::values; ++h) hyper[h] = p.hyper[h];

  const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
    typename S::Raw raw[N];
    StateVec stored[N][kKept];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      raw[v] = access(first + v).template load<D>(t.in);
      ZK_UNROLL
      for (int s = 0; s < kRead; ++s) stored[v][s].load(access(first + v), t.state[s], p.state_is_bf16[s]);
    }

    const auto parameter = [&](int v, float theta[kVector], float decayed[kVector]) {
      S::unpack(raw[v], theta);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) decayed[e] = mul(decay, theta[e]);
    };
    float sum[N][kVector][Rule::sums] = {};
    [[maybe_unused]] float root[N][kVector];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      if constexpr (kCombines) {
        float theta[kVector], decayed[kVector];
        parameter(v, theta, decayed);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) sum[v][e][0] = decayed[e];
      }
      if constexpr (kScaled) {
        stored[v][0].unpack(p.state_is_bf16[0], root[v]);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) root[v][e] = sqrt_full(root[v][e]);
      }
    }
    ZK_NO_UNROLL
    for (int k = 0; k < p.count; ++k) {
      Noise<std::remove_const_t<decltype(tile)>> noise(seed_at(p.seeds, k), tile);
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float z[kVector];
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          if constexpr (kScaled) z[e] = div(z[e], root[v][e]);
          Rule::accumulate(p.hyper, t.coeffs, k, z[e], sum[v][e]);
        }
      }
    }

    float next[N][kVector], state[N][kKept][kVector];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      float theta[kVector], decayed[kVector], old[kKept][kVector];
      parameter(v, theta, decayed);
      ZK_UNROLL
      for (int s = 0; s < Rule::states; ++s) stored[v][s].unpack(p.state_is_bf16[s], old[s]);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) {
        float values[kKept];
        ZK_UNROLL
        for (int s = 0; s < Rule::states; ++s) values[s] = old[s][e];
        next[v][e] = Rule::apply(hyper, t.coeffs, sum[v][e], theta[e], decayed[e], values);
        ZK_UNROLL
        for (int s = 0; s < Rule::states; ++s) state[v][s][e] = values[s];
      }
      const auto keep = [&](const auto& kept) {
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          next[v][e] = select_top(kept(e), next[v][e], decayed[e]);
          ZK_UNROLL
          for (int s = 0; s < Rule::states; ++s)
            state[v][s][e] = select_top(kept(e), state[v][s][e], old[s][e]);
        }
      };
      const uint64_t block = tile.template block<Whole>(first + v);
      if (t.mask != nullptr) {
        const uint32_t byte = t.mask[tile.mask_byte(block, first + v)];
        keep([&](int e) { return kept_by_bit(byte, e); });
      }
      if (p.mask_seed != nullptr) {
        const Words<uint32_t> fields = draw(philox_key(seed_at(p.mask_seed, 0)), block, tile.stream, kMask);
        keep([&](int e) { return kept_by_field(fields, e, p.mask_keep); });
      }
    }

    const auto write = [&]<bool Stochastic>(const PhiloxKey& key) {
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        const auto at = access(first + v);
        const auto random = [&](uint32_t domain) {
          return Stochastic ? draw(key, tile.template block<Whole>(first + v), tile.stream,
                                   static_cast<Domain>(domain))
                            : Words<uint32_t>{};
        };
        at.template store<D>(t.out, pack<D, Stochastic>(p, next[v], random(kRounding)));
        ZK_UNROLL
        for (int s = 0; s < Rule::states; ++s) {
          if (p.state_is_bf16[s]) {
            using State = Storage<DType::bf16>;
            at.template store<DType::bf16>(t.state[s],
                                           State::pack<Stochastic>(state[v][s], random(kState + s)));
          } else {
            using State = Storage<DType::f32>;
            at.template store<DType::f32>(t.state[s], State::pack<false>(state[v][s], {}));
          }
        }
      }
    };
    if (p.rounding_seed != nullptr) {
      write.template operator()<true>(philox_key(seed_at(p.rounding_seed, 0)));
    } else {
      write.template operator()<false>(PhiloxKey{});
    }
  };

  uint64_t all = address(t.in) | address(t.out);
  bool aligned = is_aligned<D>(all, tile.alignment());
  ZK_UNROLL
  for (int s = 0; s < kRead; ++s)
    aligned = aligned && is_aligned<DType::f32>(address(t.state[s]), tile.alignment());
  constexpr bool kRows = std::is_same_v<Launch, RowsLaunch>;
  // More vecs at a time would need too many registers.
  constexpr int kGroup = kRows && kScaled ? 1 : kRead > 0 || Rule::sums > 1 ? 2 : 4;
  for_groups<kGroup>(tile, t.numel, aligned, pass);
}

}  // namespace zk::cuda
