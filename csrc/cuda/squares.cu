// squares: the sum of z^2 of normal noise, in units of 2^-20. No tensor is read or written for it.
#include "../noise/integers.h"
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

struct SquaresEntry {
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

struct SquaresLaunch {
  const int64_t* seeds;
  // [K, columns]: threads take the columns in turn, so that they do not wait at one address
  unsigned long long* partial;
  uint32_t columns;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know (noise/normal.h)
  Table<SquaresEntry> table;
};
static_assert(sizeof(SquaresLaunch) <= kMaxArgument);

// --- the kernel ------------------------------------------------------------------------------------------

// squares on the device. The sums are integers, so that the order of threads changes no bit.

ZK_GLOBAL squares_kernel(ZK_GRID_CONSTANT SquaresLaunch p) {
  const int i = tensor_of(p.table, blockIdx.x);
  const SquaresEntry& t = p.table.tensor[i];
  const Tile<kNormal> tile(t.offset, blockIdx.x - p.table.first_chunk[i], p.table.stream[i], p.mantissa);
  if (tile.position >= t.numel) return;
  unsigned long long* partial = p.partial + (blockIdx.x * kThreads + threadIdx.x) % p.columns;

  ZK_NO_UNROLL
  for (int k = 0; k < p.count; ++k) {
    const Noise<Tile<kNormal>> noise(seed_at(p.seeds, k), tile);
    uint32_t sum = 0;  // it can hold 64 squares, which are below 43 * 2^20
    const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float z[kVector];
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const uint32_t units = square_units(z[e]);
          if constexpr (Whole) {
            sum += units;
          } else {
            sum += access(first).inside(e) ? units : 0u;
          }
        }
      }
    };
    for_groups<4>(tile, t.numel, true, pass);
    atomic_add(partial + uint64_t{p.columns} * k, sum);
  }
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

int launch_squares(const SquaresLaunch& p, uint32_t chunks, void* stream) {
  return launch(squares_kernel, chunks, stream, p);
}

// The number of partial sums of a direction. Each thread adds once for 64 elements, and if there were one
// sum, all would wait at its address.
constexpr int64_t kSquaresColumns = 8192;

Tensor squares_cuda(Tensor seeds, std::vector<int64_t> sizes, std::vector<int64_t> streams,
                    std::vector<int64_t> offsets, int64_t dist) {
  STD_TORCH_CHECK(sizes.size() == streams.size() && sizes.size() == offsets.size(),
                  "squares: sizes, streams, offsets: expected equal lengths");
  check_dist("squares", dist);
  const OnDevice on(seeds);
  if (static_cast<Domain>(dist) == kRademacher) {  // every square is 1
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    // A double holds it exactly: there are fewer than 2^42 elements, and units of 2^-20.
    return torch::stable::fill_(torch::stable::empty_like(seeds), static_cast<double>(total << 20));
  }
  Tensor partial = torch::stable::new_zeros(seeds, {seeds.numel(), kSquaresColumns});
  SquaresLaunch shared{};
  shared.seeds = pointer<int64_t>(seeds);
  shared.partial = static_cast<unsigned long long*>(partial.mutable_data_ptr());
  shared.columns = static_cast<uint32_t>(partial.size(1));
  shared.count = static_cast<int32_t>(seeds.numel());
  std::vector<Packed<SquaresEntry>> tensors;
  tensors.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const SquaresEntry entry{sizes[i], static_cast<uint64_t>(offsets[i])};
    tensors.push_back({entry, Stream(static_cast<uint64_t>(streams[i])),
                       chunks_of(entry.offset, entry.numel, kNormal)});
  }
  pack_launches(shared, tensors, [&](const SquaresLaunch& launch, uint32_t chunks) {
    check_launch("squares", launch_squares(launch, chunks, on.stream));
  });
  return torch::stable::sum(partial, std::vector<int64_t>{1});  // integers, so in any order
}

}  // namespace

ZK_REGISTER(squares, "squares(Tensor seeds, int[] sizes, int[] streams, int[] offsets, int dist) -> Tensor")

}  // namespace zk::cuda
