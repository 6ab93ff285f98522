// low_rank: theta = round(decay * theta + sum_k c_k L_k R_k^T) for matrices.
#pragma once

#include "table.h"

namespace zk::cuda {

// A warp owns kRowsOfWarp rows of 256 columns: what it reads of R serves kRowsAtOnce rows from registers.
constexpr int kRowsAtOnce = 4;
constexpr int kRowsOfWarp = 8;
constexpr int64_t kChunkRows = kWarps * kRowsOfWarp, kChunkColumns = 32 * kVector;

struct LowRankEntry {
  const void* in;
  void* out;
  const float* left;    // [K, rows, rank]
  const float* right;   // [K, columns, rank]
  const float* coeffs;  // [K]
  int64_t rows, columns;
  uint64_t offset;  // logical index of element 0
  int32_t rank;
  bool has_vectors;  // else it goes element by element, in the chunks of normal noise
};

struct LowRankLaunch {
  const float* decay;            // null: none
  const int64_t* rounding_seed;  // null: nearest
  int32_t count;                 // K
  Table<LowRankEntry> table;
};
static_assert(sizeof(LowRankLaunch) <= kMaxArgument);

// Whether every row is whole vectors at aligned addresses, and these are Philox blocks.
inline bool rows_are_vectors(const LowRankEntry& t) {
  const auto all = reinterpret_cast<uint64_t>(t.in) | reinterpret_cast<uint64_t>(t.out);
  return (all % 16 | static_cast<uint64_t>(t.columns) % kVector | t.offset % kVector) == 0;
}

// Across the columns first, so that neighbouring thread blocks continue each other's rows.
constexpr int64_t low_rank_chunks(const LowRankEntry& t) {
  if (!t.has_vectors) return chunks_of(t.offset, t.rows * t.columns, kNormal);
  return (t.rows + kChunkRows - 1) / kChunkRows * ((t.columns + kChunkColumns - 1) / kChunkColumns);
}

int launch_low_rank(const LowRankLaunch& p, uint32_t chunks, DType dtype, void* stream);

}  // namespace zk::cuda
