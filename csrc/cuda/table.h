// Plain data that every kernel shares: dtypes, the cutting of tensors into chunks, and the packing of many
// tensors into launches. No torch and no CUDA header: the host tests compile it too.
#pragma once

#include <cstdint>

#include "../noise/philox.h"

namespace zk::cuda {

enum class DType { f32, bf16, f16, i8, e4m3 };  // only wire buffers have e4m3

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;  // elements of a Philox block, and of one access of a thread

// Elements of the chunk that a thread block works on. With normal noise each thread has kSteps blocks of
// eight, and with Rademacher noise each warp has a tile of 4096.
constexpr int kSteps = 16;
constexpr int64_t kNormalChunk = int64_t{kThreads} * kVector * kSteps;
constexpr int64_t kRademacherChunk = int64_t{kWarps} * 4096;

constexpr int64_t chunk_of(Domain dist) { return dist == kNormal ? kNormalChunk : kRademacherChunk; }
constexpr int64_t tile_of(Domain dist) { return dist == kNormal ? kVector : 4096; }

// Chunks are aligned to logical indices, so that a chunk never splits a Philox block or a Rademacher tile.
constexpr int64_t chunks_of(uint64_t offset, int64_t numel, Domain dist) {
  if (numel == 0) return 0;
  const int64_t lead = static_cast<int64_t>(offset % static_cast<uint64_t>(tile_of(dist)));
  return (lead + numel + chunk_of(dist) - 1) / chunk_of(dist);
}

// Computes n / divisor for n < 2^31 by a product and a shift, as floor(n ceil(2^(31 + l) / divisor) / 2^(31 +
// l)) with l = ceil(log2 divisor). This is exact (Granlund and Montgomery, 1994): to round the factor up adds
// n e / (divisor 2^(31 + l)) to the quotient, which is below 1 / divisor, because e < divisor <= 2^l.
struct Divisor {
  uint32_t divisor, magic, shift;

  Divisor() = default;
  constexpr explicit Divisor(uint32_t d) : divisor(d), magic(0), shift(0) {
    while (uint64_t{1} << shift < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __host__ __device__
#endif
      constexpr uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{2 * n} * magic >> 32) >> shift;
  }
};

// Tensors of one launch travel as a kernel argument, so a launch needs no copy to the device, no allocation
// and no cache, and a CUDA graph captures it whole. An argument has at most 4 KiB on every architecture, and
// 32,764 bytes from compute capability 7.0 and CUDA 12.1 on (CUDA C++ Programming Guide, "Function
// Parameters"; launch.cuh asks the device). Kernels of calls with many tensors are compiled for both: a large
// argument is copied whole at each launch.
constexpr int kMaxArgument = 4096;
#if defined(ZK_SMALL_ARGUMENTS) || \
    (defined(__CUDACC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201)
constexpr int kLargeArgument = kMaxArgument;
#else
constexpr int kLargeArgument = 32764;
#endif
constexpr int kMaxShared = 72;              // bytes of a launch's argument beside the arrays of its table
constexpr int64_t kMaxChunks = 0x7fffffff;  // gridDim.x

template <class EntryType, int Bytes = kMaxArgument>
struct Table {
  using Entry = EntryType;
  static constexpr int kMax = (Bytes - kMaxShared) / (sizeof(Stream) + sizeof(uint32_t) + sizeof(Entry));
  Stream stream[kMax];
  Entry tensor[kMax];
  uint32_t first_chunk[kMax];
  int32_t tensors;
};

// A tensor of a call: its place in the table, and the number of its chunks.
template <class Entry>
struct Packed {
  Entry entry;
  Stream stream;
  int64_t chunks;
};

// Calls `launch(const Launch&, chunks)` as often as the tensors need it. `p` holds what all launches share.
template <class Launch, class Tensors, class Run>
void pack_launches(Launch p, const Tensors& tensors, const Run& launch) {
  auto& table = p.table;
  table.tensors = 0;
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.tensors > 0) launch(p, static_cast<uint32_t>(chunks));
    table.tensors = 0;
    chunks = 0;
  };
  for (const auto& tensor : tensors) {
    if (tensor.chunks == 0) continue;
    if (table.tensors == table.kMax || chunks + tensor.chunks > kMaxChunks) flush();
    table.first_chunk[table.tensors] = static_cast<uint32_t>(chunks);
    table.stream[table.tensors] = tensor.stream;
    table.tensor[table.tensors] = tensor.entry;
    ++table.tensors;
    chunks += tensor.chunks;
  }
  flush();
}

// Calls f<Bytes>() with the size of argument for so many entries. `large` says whether the device takes large
// ones.
template <class Entry, class F>
auto with_argument(size_t tensors, bool large, const F& f) {
  if constexpr (kLargeArgument > kMaxArgument) {
    if (large && tensors > Table<Entry>::kMax) return f.template operator()<kLargeArgument>();
  }
  return f.template operator()<kMaxArgument>();
}

// Calls f<D>() for a floating dtype. Every kernel but that of requantize takes these alone.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<DType::f32>();
    case DType::bf16: return f.template operator()<DType::bf16>();
    default: return f.template operator()<DType::f16>();
  }
}

}  // namespace zk::cuda
