// spread: out[k] = round(x + c_k z_k), in one read of x.
#pragma once

#include "table.h"

namespace zk::cuda {

struct SpreadLaunch {
  const int64_t* seeds;
  const float* coeffs;
  const void* in;
  void* out;  // [K, numel]
  int64_t numel;
  uint64_t offset;  // logical index of element 0
  Stream stream;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know: see noise/normal.h
};

int launch_spread(const SpreadLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream);

}  // namespace zk::cuda
