// project: partial sums of x z in the order of docs/contract.md.
#pragma once

#include "table.h"

namespace zk::cuda {

// Logical indices whose sum has one order, aligned, and the threads among which a tile is divided.
constexpr int64_t kSumTile = 4096;
constexpr int kSumThreads = 8;
constexpr int64_t kProjectChunk = kSumTile * kThreads / kSumThreads;

constexpr int64_t project_chunks(uint64_t offset, int64_t numel) {
  return numel == 0 ? 0 : (static_cast<int64_t>(offset % kSumTile) + numel + kProjectChunk - 1) / kProjectChunk;
}

struct ProjectEntry {
  const void* in;
  int64_t numel;
  uint64_t offset;  // logical index of element 0
  int64_t column;   // of its first tile in partial
};

// Directions of a thread block: x is read once for them.
constexpr int kProjectGroup = 4;

struct ProjectLaunch {
  const int64_t* seeds;
  double* partial;  // [K, columns]
  int64_t columns;
  int32_t count;    // K
  uint32_t groups;  // of directions; blocks of one chunk are neighbours, so that the others find x in the cache
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know: see noise/normal.h
  Table<ProjectEntry> table;
};
static_assert(sizeof(ProjectLaunch) <= kMaxArgument);

int launch_project(const ProjectLaunch& p, uint32_t blocks, DType dtype, Domain dist, void* stream);

}  // namespace zk::cuda
