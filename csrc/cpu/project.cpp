// project: the sum of x z over tiles of 4096 elements, in the same order for every instruction set
// (docs/contract.md). On each of them a lane holds pairs of elements. So a tile is taken as rows of 32
// elements, that is 16 columns of pairs, and a chain of fmas runs down one column for the four rows of a
// segment. Only the sums of segments are float64.
#include "kernels.h"

namespace zk::cpu {

// Writes to out[stride * k] the sum of x z_k over a span that lies inside one logical tile of 4096.
ZK_KERNEL(project, const Terms&, const Span&, void* scratch, double* out, int64_t stride)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

constexpr int kSegment = 128, kSegments = kRademacherTile / kSegment, kColumns = 16;

// Reads elements that were converted to fp32 before, instead of those of the tensor.
template <class L>
struct Loaded {
  using T = float;
  static ZK_HD void load(const T* p, typename L::F x[8]) {
    for (int e = 0; e < 8; ++e) x[e] = L::load_row(p + e * L::width);
  }
};

// Sums the segments [first, stop) of the tile that begins at `block`. `array` points to the elements of
// segment `first` and is read by S::load.
template <class L, class S, Domain Dist>
__attribute__((noinline)) double sum_of(const PhiloxKey& key, Stream stream, uint64_t block,
                                        const void* array, int first, int stop, bool ahead, void* scratch) {
  using F = typename L::F;
  constexpr int registers = kColumns / L::width, tiles = kSegment / (8 * L::width), step = 8 * L::width;
  const auto* x = static_cast<const typename S::T*>(array);
  alignas(64) double sums[2][kColumns] = {};
  block += first * (kSegment / 8);
  Noise<L, Dist> noise(&key, 1, stream, block, scratch);
  noise.enter(block, block + 1);
  for (int s = first; s < stop; ++s) {
    F chain[registers];
    for (int r = 0; r < registers; ++r) chain[r] = Splat<F>::of(0.0f);
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t, block += L::width, x += step) {
      F v[8], z[8];
      if (ahead) {
        for (uint64_t b = 0; b < sizeof(typename S::T) * step; b += 64) {
          __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uint64_t>(x) + kPrefetch + b));
        }
      }
      S::load(x, v);
      noise.take(0, Tile<L, true>{block, 0});
      noise.values(z);
      for (int i = 0; i < 4; ++i) {
        F& c = chain[registers > 4 ? (4 * t + i) % registers : i % registers];
        c = fma(v[2 * i + 1], z[2 * i + 1], fma(v[2 * i], z[2 * i], c));
      }
    }
    for (int r = 0; r < registers; ++r) L::add_row(sums[s & 1] + r * L::width, chain[r]);
  }
  double* all = sums[0];
  for (int n = kColumns; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) all[i] = all[2 * i] + all[2 * i + 1];
  }
  return all[0];
}

template <class L, DType D, Domain Dist>
void run(const Terms& op, const Span& span, void* scratch, double* out, int64_t stride) {
  using T = typename Storage<L, D>::T;
  const uint64_t index = span.offset + static_cast<uint64_t>(span.begin), tile = index / kRademacherTile;
  const int skip = static_cast<int>(index % kRademacherTile), count = static_cast<int>(span.end - span.begin);
  const int first = skip / kSegment, stop = (skip + count + kSegment - 1) / kSegment;
  const T* x = static_cast<const T*>(span.in) + span.begin;
  const bool whole = skip % kSegment == 0 && count % kSegment == 0;
  alignas(64) T buffer[kRademacherTile];
  if (!whole) {
    __builtin_memset(buffer, 0, (stop - first) * kSegment * sizeof(T));
    __builtin_memcpy(buffer + skip % kSegment, x, count * sizeof(T));
    x = buffer;
  }
  const uint64_t block = tile * (kRademacherTile / 8);
  if (op.count == 1) {
    *out = sum_of<L, Storage<L, D>, Dist>(*op.keys, span.stream, block, x, first, stop, whole, scratch);
    return;
  }
  // The elements are converted once for all directions. With eight Rademacher directions of fp32 that takes
  // 0.25 instead of 0.34 ns an element (on a busy machine).
  alignas(64) float loaded[kRademacherTile];
  for (int at = 0; at < (stop - first) * kSegment; at += 8 * L::width) {
    typename L::F v[8];
    Storage<L, D>::load(x + at, v);
    for (int e = 0; e < 8; ++e) L::store_row(loaded + at + e * L::width, v[e]);
  }
  for (int64_t k = 0; k < op.count; ++k) {
    out[k * stride] = sum_of<L, Loaded<L>, Dist>(op.keys[k], span.stream, block, loaded, first, stop, false,
                                                 scratch);
  }
}

template <class L, DType D>
void run_dtype(const Terms& op, const Span& span, void* scratch, double* out, int64_t stride) {
  op.dist == kNormal ? run<L, D, kNormal>(op, span, scratch, out, stride)
                     : run<L, D, kRademacher>(op, span, scratch, out, stride);
}

}  // namespace

void ZK_ISA::project(const Terms& op, const Span& span, void* scratch, double* out, int64_t stride) {
  switch (op.dtype) {
    case DType::f32: return run_dtype<ZK_LANES, DType::f32>(op, span, scratch, out, stride);
    case DType::bf16: return run_dtype<ZK_LANES, DType::bf16>(op, span, scratch, out, stride);
    case DType::f16: return run_dtype<ZK_LANES, DType::f16>(op, span, scratch, out, stride);
    default: return;
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

constexpr int64_t kSumTile = 4096;  // as check_project (op_args.h) counts tiles

// How many sums each tile has in `partial`.
int64_t project_columns_cpu() { return 1; }

void project_cpu(Tensor partial, TensorList tensors, Tensor seeds, std::vector<int64_t> streams,
                 std::vector<int64_t> offsets, int64_t dist, std::string isa) {
  check_project(partial, project_columns_cpu(), tensors, seeds, streams, offsets, dist);
  const int64_t count = seeds.numel(), tiles = partial.size(1);
  if (count == 0 || tiles == 0) return;
  std::vector<PhiloxKey> keys;
  for (int64_t k = 0; k < count; ++k) keys.push_back(philox_key(data<uint64_t>(seeds)[k]));
  std::vector<Span> spans;
  std::vector<int64_t> starts;  // how many tiles lie before each span
  int64_t before = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Span span{};
    span.numel = tensors[i].numel();
    if (span.numel == 0) continue;
    span.in = tensors[i].const_data_ptr();
    span.offset = static_cast<uint64_t>(offsets[i]);
    span.stream = Stream(static_cast<uint64_t>(streams[i]));
    spans.push_back(span);
    starts.push_back(before);
    before += sum_tiles(span.offset, span.numel);
  }
  Terms terms{};
  terms.keys = keys.data();
  terms.count = count;
  terms.dist = static_cast<Domain>(dist);
  terms.dtype = dtype_of(tensors[0]);
  auto* sums = static_cast<double*>(partial.mutable_data_ptr());
  const auto kernel = ZK_KERNEL_OF(project, isa);
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (kSumTile * count)),
                              [&](int64_t begin, int64_t end) {
    alignas(64) std::byte scratch[kScratchPerDirection];
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (i + 1 < static_cast<int64_t>(starts.size()) && starts[i + 1] <= tile) ++i;
      Span piece = spans[i];
      const int64_t lead = static_cast<int64_t>(piece.offset % kSumTile),
                    first = (tile - starts[i]) * kSumTile - lead;
      piece.begin = std::max<int64_t>(first, 0);
      piece.end = std::min(first + kSumTile, piece.numel);
      kernel(terms, piece, scratch, sums + tile, tiles);
    }
  });
}

}  // namespace

ZK_REGISTER_CONSTANT(project_columns, "project_columns() -> int")
ZK_REGISTER(project,
            "project(Tensor(a!) partial, Tensor[] tensors, Tensor seeds, "
            "int[] streams, int[] offsets, int dist, str isa) -> ()")

}  // namespace zk::cpu

#endif
