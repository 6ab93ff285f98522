// spread on the device: x stays in registers while the directions pass.
#pragma once

#include "device.cuh"
#include "spread.h"

namespace zk::cuda {

template <DType D, Domain Dist>
ZK_GLOBAL spread_kernel(ZK_GRID_CONSTANT SpreadLaunch p) {
  using S = Storage<D>;
  using T = typename S::T;
  const Tile<Dist> tile(p.offset, blockIdx.x, p.stream, p.mantissa);

  const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
    typename S::Raw raw[N];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) raw[v] = access(first + v).template load<D>(p.in);
    ZK_NO_UNROLL
    for (int k = 0; k < p.count; ++k) {
      const Noise<Tile<Dist>> noise(seed_at(p.seeds, k), tile);
      const float c = p.coeffs[k];
      T* out = static_cast<T*>(p.out) + k * p.numel;
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float x[kVector], z[kVector];
        S::unpack(raw[v], x);
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) x[e] = fma(c, z[e], x[e]);
        access(first + v).template store<D>(out, S::template pack<false>(x, {}));
      }
    }
  };

  const bool aligned = is_aligned<D>(address(p.in) | address(p.out) | p.numel * sizeof(T), p.offset);
  for_groups<4>(tile, p.numel, aligned, pass);
}

}  // namespace zk::cuda
