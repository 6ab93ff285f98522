// squares on the device: sums of integers, so that no order of threads changes a bit.
#pragma once

#include "../noise/integers.h"
#include "device.cuh"
#include "squares.h"

namespace zk::cuda {

ZK_GLOBAL squares_kernel(ZK_GRID_CONSTANT SquaresLaunch p) {
  const int i = tensor_of(p.table, blockIdx.x);
  const SquaresEntry& t = p.table.tensor[i];
  const Tile<kNormal> tile(t.offset, blockIdx.x - p.table.first_chunk[i], p.table.stream[i], p.mantissa);
  if (tile.position >= t.numel) return;
  unsigned long long* partial = p.partial + (blockIdx.x * kThreads + threadIdx.x) % p.columns;

  ZK_NO_UNROLL
  for (int k = 0; k < p.count; ++k) {
    const Noise<Tile<kNormal>> noise(seed_at(p.seeds, k), tile);
    uint32_t sum = 0;  // of 64 elements below 43 * 2^20
    const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float z[kVector];
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const uint32_t units = square_units(z[e]);
          if constexpr (Whole) {
            sum += units;
          } else {
            sum += access(first).inside(e) ? units : 0u;
          }
        }
      }
    };
    for_groups<4>(tile, t.numel, true, pass);
    atomic_add(partial + uint64_t{p.columns} * k, sum);
  }
}

}  // namespace zk::cuda
