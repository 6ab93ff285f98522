// project: the partial sums of x z, in the order of docs/contract.md.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

// The elements of a tile, which are summed together in one order, and the threads that share a tile.
constexpr int64_t kSumTile = 4096;
constexpr int kSumThreads = 8;
constexpr int64_t kProjectChunk = kSumTile * kThreads / kSumThreads;

constexpr int64_t project_chunks(uint64_t offset, int64_t numel) {
  return numel == 0 ? 0
                    : (static_cast<int64_t>(offset % kSumTile) + numel + kProjectChunk - 1) / kProjectChunk;
}

struct ProjectEntry {
  const void* in;
  int64_t numel;
  uint64_t offset;  // logical index of element 0
  int64_t column;   // the column of `partial` for its first tile
};

// How many directions a thread block takes: it reads x once for them.
constexpr int kProjectGroup = 4;

struct ProjectLaunch {
  const int64_t* seeds;
  double* partial;  // [K, columns]
  int64_t columns;
  int32_t count;  // K
  // The number of groups of directions. The thread blocks of one chunk are neighbours, so that all but the
  // first find x in the cache.
  uint32_t groups;
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know (noise/normal.h)
  Table<ProjectEntry> table;
};
static_assert(sizeof(ProjectLaunch) <= kMaxArgument);

// --- the kernel ------------------------------------------------------------------------------------------

// project on the device. A tile of 4096 elements is 32 segments of 16 vecs. A thread has the even or the odd
// segments, and of each the vecs c, c + 4, c + 8 and c + 12, along which it makes four chains of fmas. So
// each chain of the contract is made by one thread, and the signs of its 512 elements are in four Philox
// blocks.

// The part of a tile that a thread sums.
struct SumTile {
  uint64_t start;    // the logical index at which the tile begins
  int64_t position;  // where that is in the tensor
  Stream stream;
  uint32_t column, parity, mantissa;

  static constexpr int kRows = 4, kSegments = 16;
  ZK_DEVICE uint32_t vec(int segment, int row) const {
    return 16 * (2 * segment + parity) + 4 * row + column;
  }
  ZK_DEVICE bool is_whole(int64_t numel) const { return position >= 0 && position + kSumTile <= numel; }
};

template <Domain Dist>
struct SumNoise;

template <>
struct SumNoise<kNormal> {
  PhiloxKey key;

  ZK_DEVICE SumNoise(uint64_t seed, const SumTile&) : key(philox_key(seed)) {}
  ZK_DEVICE void vec(const SumTile& tile, int segment, int row, float z[kVector]) const {
    // The number of the tile's first block is a multiple of 512, so the sum cannot carry into the upper word.
    normals(draw(key, tile.start / kVector | tile.vec(segment, row), tile.stream, kNormal), z, tile.mantissa);
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

// Sums for N directions from number `first` on.
template <int N, DType D, Domain Dist, class Launch>
ZK_DEVICE void project_group(const Launch& p, const ProjectEntry& t, const SumTile& tile, int first,
                             double* out) {
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
  for (int k = 0; k < N; ++k)
    out[(first + k) * p.columns] = (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
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

// --- the entry -------------------------------------------------------------------------------------------

namespace {

int launch_project(const ProjectLaunch& p, uint32_t blocks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return launch(dist == kNormal ? project_kernel<D, kNormal> : project_kernel<D, kRademacher>, blocks,
                  stream, p);
  });
}

// How many sums a tile has in `partial`: each of its threads writes one, so that they need not communicate.
int64_t project_columns_cuda() { return kSumThreads; }

void project_cuda(Tensor partial, TensorList tensors, Tensor seeds, std::vector<int64_t> streams,
                  std::vector<int64_t> offsets, int64_t dist) {
  check_project(partial, project_columns_cuda(), tensors, seeds, streams, offsets, dist);
  if (partial.numel() == 0) return;
  const OnDevice on(seeds);
  const DType dtype = dtype_of("project", tensors[0]);
  ProjectLaunch shared{};
  shared.seeds = pointer<int64_t>(seeds);
  shared.partial = static_cast<double*>(partial.mutable_data_ptr());
  shared.columns = partial.size(1);
  shared.count = static_cast<int32_t>(seeds.numel());
  shared.groups = static_cast<uint32_t>((seeds.numel() + kProjectGroup - 1) / kProjectGroup);
  std::vector<Packed<ProjectEntry>> entries;
  int64_t column = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ProjectEntry entry{tensors[i].const_data_ptr(), tensors[i].numel(),
                             static_cast<uint64_t>(offsets[i]), column};
    column += sum_tiles(entry.offset, entry.numel) * kSumThreads;
    entries.push_back({entry, Stream(static_cast<uint64_t>(streams[i])),
                       project_chunks(entry.offset, entry.numel)});
  }
  pack_launches(shared, entries, [&](const ProjectLaunch& launch, uint32_t chunks) {
    STD_TORCH_CHECK(int64_t{chunks} * launch.groups <= kMaxChunks,
                    "project: tensors, seeds: expected fewer elements at a time");
    check_launch("project",
                 launch_project(launch, chunks * launch.groups, dtype, static_cast<Domain>(dist), on.stream));
  });
}

}  // namespace

ZK_REGISTER_CONSTANT(project_columns, "project_columns() -> int")
ZK_REGISTER(project,
            "project(Tensor(a!) partial, Tensor[] tensors, Tensor seeds, "
            "int[] streams, int[] offsets, int dist) -> ()")

}  // namespace zk::cuda
