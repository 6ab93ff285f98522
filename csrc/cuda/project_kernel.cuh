// project on the device. A tile of 4096 is 32 segments of 16 vecs; of each a thread has vecs c, c + 4, c + 8 and c + 12, that is
// one chain of fmas down each of four columns, and of the segments the even or the odd ones. So the chains of the contract stay
// in one thread, and so do the signs of 512 elements in four Philox blocks.
#pragma once

#include <utility>

#include "device.cuh"
#include "project.h"

namespace zk::cuda {

// A thread's part of a tile.
struct SumTile {
  uint64_t start;    // logical index of the tile
  int64_t position;  // of `start` in the tensor
  Stream stream;
  uint32_t column, parity, mantissa;

  static constexpr int kRows = 4, kSegments = 16;
  ZK_DEVICE uint32_t vec(int segment, int row) const { return 16 * (2 * segment + parity) + 4 * row + column; }
  ZK_DEVICE bool is_whole(int64_t numel) const { return position >= 0 && position + kSumTile <= numel; }
};

template <Domain Dist>
struct SumNoise;

template <>
struct SumNoise<kNormal> {
  PhiloxKey key;

  ZK_DEVICE SumNoise(uint64_t seed, const SumTile&) : key(philox_key(seed)) {}
  ZK_DEVICE void vec(const SumTile& tile, int segment, int row, float z[kVector]) const {
    // The tile's first block is a multiple of 512: no carry into the upper word.
    normal8(draw(key, tile.start / kVector | tile.vec(segment, row), tile.stream, kNormal), z, tile.mantissa);
  }
};

template <>
struct SumNoise<kRademacher> {
  Words<uint32_t> signs[SumTile::kRows];

  ZK_DEVICE SumNoise(uint64_t seed, const SumTile& tile) {
    const PhiloxKey key = philox_key(seed);
    const uint64_t first = tile.start / kRademacherTile * kRademacherBlocks;
    ZK_UNROLL
    for (int row = 0; row < SumTile::kRows; ++row) {
      signs[row] = draw(key, first | (tile.vec(0, row) & 31), tile.stream, kRademacher);
    }
  }
  ZK_DEVICE void vec(const SumTile&, int segment, int row, float z[kVector]) const {
    const uint32_t word = word_of(signs[row], segment) >> (8 * (segment % 4));
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) z[e] = signed_coefficient(word, e, 1.0f);
  }
};

template <class T, int N>
struct Array {
  T at[N];
};

// N directions from `first` on.
template <int N, DType D, Domain Dist, class Launch>
ZK_DEVICE void project_group(const Launch& p, const ProjectEntry& t, const SumTile& tile, int first, double* out) {
  using S = Storage<D>;
  const auto noises = [&]<int... I>(std::integer_sequence<int, I...>) {
    return Array<SumNoise<Dist>, N>{{SumNoise<Dist>(seed_at(p.seeds, first + I), tile)...}};
  }(std::make_integer_sequence<int, N>{});
  double sums[N][4] = {};
  const bool whole = tile.is_whole(t.numel) && is_aligned<D>(address(t.in), t.offset);
  ZK_NO_UNROLL
  for (int segment = 0; segment < SumTile::kSegments; ++segment) {
    typename S::Raw raw[SumTile::kRows];
    ZK_UNROLL
    for (int row = 0; row < SumTile::kRows; ++row) {
      const int64_t at = tile.position + int64_t{kVector} * tile.vec(segment, row);
      raw[row] = whole ? VectorAccess{at, 0}.load<D>(t.in) : EdgeAccess{at, t.numel}.load<D>(t.in);
    }
    ZK_UNROLL
    for (int k = 0; k < N; ++k) {
      float chain[4] = {};
      ZK_UNROLL
      for (int row = 0; row < SumTile::kRows; ++row) {
        float x[kVector], z[kVector];
        S::unpack(raw[row], x);
        noises.at[k].vec(tile, segment, row, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) chain[e / 2] = fma(x[e], z[e], chain[e / 2]);
      }
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) sums[k][j] += chain[j];
    }
  }
  ZK_UNROLL
  for (int k = 0; k < N; ++k) out[(first + k) * p.columns] = (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
}

template <DType D, Domain Dist>
ZK_GLOBAL project_kernel(ZK_GRID_CONSTANT ProjectLaunch p) {
  const uint32_t chunk = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int i = tensor_of(p.table, chunk);
  const ProjectEntry& t = p.table.tensor[i];
  const uint32_t thread = threadIdx.x % kSumThreads;
  const uint64_t number = uint64_t{chunk - p.table.first_chunk[i]} * (kThreads / kSumThreads) +
                          threadIdx.x / kSumThreads;
  SumTile tile;
  tile.start = (t.offset / kSumTile + number) * kSumTile;
  tile.position = static_cast<int64_t>(tile.start - t.offset);
  tile.column = thread % 4;
  tile.parity = thread / 4;
  tile.stream = p.table.stream[i];
  tile.mantissa = p.mantissa;
  if (tile.position >= t.numel) return;

  double* out = p.partial + t.column + number * kSumThreads + thread;
  int k = group * kProjectGroup;
  const int stop = k + kProjectGroup;
  if (stop <= p.count) return project_group<kProjectGroup, D, Dist>(p, t, tile, k, out);
  ZK_NO_UNROLL
  for (; k < p.count; ++k) project_group<1, D, Dist>(p, t, tile, k, out);
}

}  // namespace zk::cuda
