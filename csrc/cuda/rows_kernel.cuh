// Plain combine, without masks and curvature, of tensors whose rows are parts of a matrix's rows. For all
// other operations on such tensors see update_kernel.cuh.
#pragma once

#include "device.cuh"
#include "update.h"

namespace zk::cuda {

// K is the number of directions, 1, or 0 for any number.
template <DType D, Domain Dist, int K, bool Decay, bool Stochastic>
ZK_GLOBAL combine_rows_kernel(ZK_GRID_CONSTANT RowsLaunch p) {
  using S = Storage<D>;
  constexpr bool kRound = Stochastic && D != DType::f32;
  const int i = tensor_of(p.table, blockIdx.x);
  const RowsEntry& t = p.table.tensor[i];
  const RowTile<Dist> tile(t, blockIdx.x - p.table.first_chunk[i], p.table.stream[i], p.mantissa);
  const bool decays = Decay && p.decay != nullptr;
  const float decay = decays ? *p.decay : 1.0f;
  PhiloxKey rounding{};
  if constexpr (kRound) rounding = philox_key(seed_at(p.rounding_seed, 0));

  const auto pass_with = [&](auto noise, float first_coeff) {
    const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
      typename S::Raw raw[N];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) raw[v] = access(first + v).template load<D>(t.in);
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float acc[kVector];
        S::unpack(raw[v], acc);
        if (decays) {
          ZK_UNROLL
          for (int e = 0; e < kVector; ++e) acc[e] = mul(decay, acc[e]);
        }
        const auto direction = [&](auto& of, float c) {
          float z[kVector];
          of.template vec<Whole>(tile, first + v, z);
          ZK_UNROLL
          for (int e = 0; e < kVector; ++e) acc[e] = fma(c, z[e], acc[e]);
        };
        if constexpr (K == 1) {
          direction(noise, first_coeff);
        } else {
          for (int k = 0; k < p.count; ++k) {
            Noise<RowTile<Dist>> other(seed_at(p.seeds, k), tile);
            direction(other, t.coeffs[k]);
          }
        }
        Words<uint32_t> random{};
        if constexpr (kRound)
          random = draw(rounding, tile.template block<Whole>(first + v), tile.stream, kRounding);
        access(first + v).template store<D>(t.out, S::template pack<kRound>(acc, random));
      }
    };
    for_groups<8>(tile, t.numel, is_aligned<D>(address(t.in) | address(t.out), tile.alignment()), pass);
  };
  if constexpr (K == 1) {
    pass_with(Noise<RowTile<Dist>>(seed_at(p.seeds, 0), tile), t.coeffs[0]);
  } else {
    pass_with(0, 0.0f);
  }
}

}  // namespace zk::cuda
