// Plain combine and fan-out: one coefficient a direction, no masks, no curvature. Others: update.h.
#pragma once

#include "op.cuh"

namespace zk::cuda {

struct CombineEntry {
  const void* in;
  void* out;
  void* plus;   // fan-out only
  void* minus;  // fan-out only
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

struct CombineShared {
  const int64_t* seeds;
  const float* coeffs;
  const float* decay;            // null: none
  const int64_t* rounding_seed;  // null: nearest
  const int64_t* probe_seed;     // null: combine; else fan-out, from the rounded theta, along this direction
  const float* probe_coeff;
  int32_t count;  // K
};

template <int Bytes>
struct CombineLaunch : CombineShared {
  Table<CombineEntry, Bytes> table;
  // A constant that the compiler must not know: see noise/normal.h. Here and not beside count, with which it
  // would be loaded as one pair of registers: fan-outs then spill.
  uint32_t mantissa = 0x007fffffu;
};
static_assert(sizeof(CombineLaunch<kMaxArgument>) <= kMaxArgument);
static_assert(sizeof(CombineLaunch<kLargeArgument>) <= kLargeArgument);

// Launches plain combine, or fan-out where a probe seed is given (combine.cu). `on`: a tensor of their
// device.
void run_plain(const char* op, CombineShared shared, const Rows& rows, const TermArgs& terms,
               const Tensor& on);

}  // namespace zk::cuda
