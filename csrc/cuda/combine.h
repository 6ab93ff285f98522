// The plain-data interface between the torch-facing file and the kernels, and the packing of many tensors into launches.
// No torch and no CUDA header: the host tests compile it too.
#pragma once

#include <cstdint>

#include "../noise/philox.h"

namespace zk::cuda {

enum class DType { f32, bf16, f16 };

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements of a Philox block, and of a thread's access

// Elements of a thread block's chunk. Normal: kSteps blocks of eight a thread. Rademacher: a tile of 4096 a warp.
constexpr int kSteps = 8;
constexpr int64_t kNormalChunk = int64_t{kThreads} * kVector * kSteps;
constexpr int64_t kRademacherChunk = int64_t{kThreads / 32} * 4096;

constexpr int64_t chunk_of(Domain dist) { return dist == kNormal ? kNormalChunk : kRademacherChunk; }
constexpr int64_t tile_of(Domain dist) { return dist == kNormal ? kVector : 4096; }

struct TensorEntry {
  const void* in;
  void* out;
  void* plus;   // fan-out only
  void* minus;  // fan-out only
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

// Tensors of one launch travel as a kernel argument (4 KiB at most on every architecture), so a launch needs no copy to the
// device, no allocation and no cache, and a CUDA graph captures it whole.
constexpr int kMaxTensors = 70;

struct CombineLaunch {
  const int64_t* seeds;
  const float* coeffs;
  const float* decay;            // null: none
  const int64_t* rounding_seed;  // null: nearest
  const int64_t* probe_seed;     // null: combine; else fan-out, from the rounded theta, along this direction
  const float* probe_coeff;
  int32_t count;  // K
  int32_t tensors;
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know: see noise/normal.h
  uint32_t first_chunk[kMaxTensors];
  uint32_t stream[kMaxTensors];
  TensorEntry tensor[kMaxTensors];
};
static_assert(sizeof(CombineLaunch) <= 4096);

// Chunks are aligned to logical indices, so that a chunk never splits a Philox block or a Rademacher tile.
constexpr int64_t chunks_of(const TensorEntry& t, Domain dist) {
  const uint64_t tile = static_cast<uint64_t>(tile_of(dist));
  const uint64_t lead = t.offset % tile;
  return (static_cast<int64_t>(lead) + t.numel + chunk_of(dist) - 1) / chunk_of(dist);
}

// Launches `launch(const CombineLaunch&, chunks)` as often as needed; `first` holds what all launches share.
template <class Tensors, class Launch>
void pack_launches(CombineLaunch shared, const Tensors& tensors, Domain dist, const Launch& launch) {
  constexpr int64_t max_chunks = 0x7fffffff;  // gridDim.x
  CombineLaunch p = shared;
  p.tensors = 0;
  int64_t chunks = 0;
  const auto flush = [&] {
    if (p.tensors > 0) launch(p, static_cast<uint32_t>(chunks));
    p.tensors = 0;
    chunks = 0;
  };
  for (const auto& [entry, stream] : tensors) {
    if (entry.numel == 0) continue;
    const int64_t more = chunks_of(entry, dist);
    if (p.tensors == kMaxTensors || chunks + more > max_chunks) flush();
    p.first_chunk[p.tensors] = static_cast<uint32_t>(chunks);
    p.stream[p.tensors] = stream;
    p.tensor[p.tensors] = entry;
    ++p.tensors;
    chunks += more;
  }
  flush();
}

// stream: a cudaStream_t. Returns a cudaError_t (0 is success).
int launch_combine(const CombineLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream);
int launch_derive_seed(const int64_t* run_seed, const int64_t* step, const int64_t* k, int64_t* out, int64_t n,
                       void* stream);
const char* error_string(int error);

}  // namespace zk::cuda
