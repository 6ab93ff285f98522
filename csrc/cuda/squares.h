// squares: sum of z^2 over normal noise, in units of 2^-20. No element is read or written.
#pragma once

#include "table.h"

namespace zk::cuda {

struct SquaresEntry {
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

struct SquaresLaunch {
  const int64_t* seeds;
  unsigned long long* partial;  // [K, columns]: threads take columns in turn, so that they do not meet at one address
  uint32_t columns;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know: see noise/normal.h
  Table<SquaresEntry> table;
};
static_assert(sizeof(SquaresLaunch) <= kMaxArgument);

int launch_squares(const SquaresLaunch& p, uint32_t chunks, void* stream);

}  // namespace zk::cuda
