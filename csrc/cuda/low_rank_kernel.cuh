// low_rank on the device. A thread owns eight columns in several rows, so that what it reads of R serves all of them:
// for one row R is 4 * rank bytes an element from the first-level cache, beside 4 bytes of bf16 theta from memory.
#pragma once

#include "device.cuh"
#include "low_rank.h"

namespace zk::cuda {

// R consecutive values of a factor: one or, at an aligned address, four.
template <int R>
ZK_DEVICE void load_factor(const float* p, float x[R]) {
  if constexpr (R == 4) {
    const Vec16 v = *reinterpret_cast<const Vec16*>(p);
    ZK_UNROLL
    for (int r = 0; r < R; ++r) x[r] = from_bits(v.w[r]);
  } else {
    x[0] = *p;
  }
}

// acc + sum_k c_k L_k R_k^T for N rows from `row` and eight columns from `column`, the rank in steps of R.
template <int N, int R>
ZK_DEVICE void add_products(const LowRankEntry& t, int count, int64_t row, int64_t column, float acc[N][kVector]) {
  ZK_NO_UNROLL
  for (int k = 0; k < count; ++k) {
    const float* left = t.left + (k * t.rows + row) * t.rank;
    const float* right = t.right + (k * t.columns + column) * t.rank;
    float product[N][kVector] = {};
    ZK_NO_UNROLL
    for (int at = 0; at < t.rank; at += R) {
      float l[N][R], x[kVector][R];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) load_factor<R>(left + v * t.rank + at, l[v]);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) load_factor<R>(right + e * t.rank + at, x[e]);
      ZK_UNROLL
      for (int r = 0; r < R; ++r) {
        ZK_UNROLL
        for (int v = 0; v < N; ++v) {
          ZK_UNROLL
          for (int e = 0; e < kVector; ++e) product[v][e] = fma(l[v][r], x[e][r], product[v][e]);
        }
      }
    }
    const float c = t.coeffs[k];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[v][e] = fma(c, product[v][e], acc[v][e]);
    }
  }
}

// The same for the element at (row, column).
ZK_DEVICE float add_product(const LowRankEntry& t, int count, int64_t row, int64_t column, float acc) {
  for (int k = 0; k < count; ++k) {
    const float* left = t.left + (k * t.rows + row) * t.rank;
    const float* right = t.right + (k * t.columns + column) * t.rank;
    float product = 0.0f;
    for (int r = 0; r < t.rank; ++r) product = fma(left[r], right[r], product);
    acc = fma(t.coeffs[k], product, acc);
  }
  return acc;
}

template <DType D>
ZK_GLOBAL low_rank_kernel(ZK_GRID_CONSTANT LowRankLaunch p) {
  using S = Storage<D>;
  const int i = tensor_of(p.table, blockIdx.x);
  const LowRankEntry& t = p.table.tensor[i];
  const uint32_t chunk = blockIdx.x - p.table.first_chunk[i];
  const Stream stream = p.table.stream[i];
  const float decay = p.decay != nullptr ? *p.decay : 1.0f;  // 1 * x is x

  const auto load = [&](const auto& at, float acc[kVector]) {
    S::unpack(at.template load<D>(t.in), acc);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) acc[e] = mul(decay, acc[e]);
  };
  const auto store = [&](const auto& at, uint64_t block, const float acc[kVector]) {
    if (D != DType::f32 && p.rounding_seed != nullptr) {
      const Words<uint32_t> random = draw(philox_key(seed_at(p.rounding_seed, 0)), block, stream, kRounding);
      at.template store<D>(t.out, S::template pack<true>(acc, random));
    } else {
      at.template store<D>(t.out, S::template pack<false>(acc, {}));
    }
  };

  if (t.has_vectors) {
    const uint32_t across = static_cast<uint32_t>((t.columns + kChunkColumns - 1) / kChunkColumns);
    const int64_t column = chunk % across * kChunkColumns + threadIdx.x % 32 * kVector;
    const int64_t first = chunk / across * kChunkRows + threadIdx.x / 32 * kRowsOfWarp;
    if (column >= t.columns) return;
    const bool by_four = (t.rank % 4 | (address(t.left) | address(t.right)) % 16) == 0;
    const auto rows = [&]<int N>(int64_t row) {
      const auto at = [&](int v) { return VectorAccess{(row + v) * t.columns + column, 0}; };
      float acc[N][kVector];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) load(at(v), acc[v]);
      if (by_four) {
        add_products<N, 4>(t, p.count, row, column, acc);
      } else {
        add_products<N, 1>(t, p.count, row, column, acc);
      }
      ZK_UNROLL
      for (int v = 0; v < N; ++v) store(at(v), (t.offset + at(v).base) / kVector, acc[v]);
    };
    ZK_NO_UNROLL
    for (int64_t row = first; row < first + kRowsOfWarp && row < t.rows; row += kRowsAtOnce) {
      if (row + kRowsAtOnce <= t.rows) {
        rows.template operator()<kRowsAtOnce>(row);
      } else {
        ZK_NO_UNROLL
        for (int64_t r = row; r < t.rows; ++r) rows.template operator()<1>(r);
      }
    }
    return;
  }

  const int64_t numel = t.rows * t.columns;
  const Tile<kNormal> tile(t.offset, chunk, stream, 0);
  ZK_NO_UNROLL
  for (int step = 0; step < tile.kVecs; ++step) {
    const EdgeAccess at = tile.edge(step, numel);
    if (at.first + kVector <= 0 || at.first >= numel) continue;
    float acc[kVector];
    load(at, acc);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const int64_t index = at.first + e;
      if (at.inside(e)) acc[e] = add_product(t, p.count, index / t.columns, index % t.columns, acc[e]);
    }
    store(at, tile.template block<false>(step), acc);
  }
}

}  // namespace zk::cuda
