// Plain combine and fan-out, which have one coefficient for each direction, no masks and no curvature.
// update.h has the others.
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
  const float* decay;            // null: there is none
  const int64_t* rounding_seed;  // null: rounding is to nearest
  const int64_t* probe_seed;     // the direction of a fan-out from the rounded theta; null: combine alone
  const float* probe_coeff;
  int32_t count;  // K
};

template <int Bytes>
struct CombineLaunch : CombineShared {
  Table<CombineEntry, Bytes> table;
  // A constant that the compiler must not know (noise/normal.h says why). It does not stand beside count,
  // because both would be loaded as a pair of registers, and fan-outs would spill.
  uint32_t mantissa = 0x007fffffu;
};
static_assert(sizeof(CombineLaunch<kMaxArgument>) <= kMaxArgument);
static_assert(sizeof(CombineLaunch<kLargeArgument>) <= kLargeArgument);

// Launches plain combine, or fan-out where there is a probe seed (combine.cu). `on` is a tensor of their
// device.
void run_plain(const char* op, CombineShared shared, const Rows& rows, const TermArgs& terms,
               const Tensor& on);

}  // namespace zk::cuda
