// squares: for each direction the sum of z^2. The squares are integers, so the order of the sum does not
// matter.
#include "kernels.h"

namespace zk::cpu {

// Adds to sums [K] the sum of each direction's squares, in units of 2^-20. For normal noise alone.
ZK_KERNEL(squares, const Terms&, const Span&, uint64_t* sums)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

template <class L>
void run(const Terms& op, const Span& span, uint64_t* sums) {
  constexpr int64_t size = Tile<L, true>::size;
  using F = typename L::F;
  using U = typename L::U;
  const auto begin = [&](uint64_t block) ZK_INLINE {
    return Noise<L, kNormal>(op.keys, op.count, span.stream, block, nullptr);
  };
  for_tiles<L>(span, begin, [op, sums](const auto& tile, auto& noise) ZK_INLINE {
    for (int64_t k = 0; k < op.count; ++k) {
      F z[8];
      noise.take(k, tile);
      noise.values(z);
      if constexpr (tile.whole) {
        U units = square_units(z[0]);
        for (int e = 1; e < 8; ++e) units = units + square_units(z[e]);  // below 2^29
        uint32_t lanes[L::width];
        __builtin_memcpy(lanes, &units, sizeof(lanes));
        for (const uint32_t lane : lanes) sums[k] += lane;
      } else {
        alignas(64) float buffer[size];
        L::store_floats(buffer, z);
        for (int64_t i = 0; i < tile.count; ++i) sums[k] += square_units(buffer[tile.skip + i]);
      }
    }
  });
}

}  // namespace

void ZK_ISA::squares(const Terms& op, const Span& span, uint64_t* sums) { run<ZK_LANES>(op, span, sums); }

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

Tensor squares_cpu(Tensor seeds, std::vector<int64_t> sizes, std::vector<int64_t> streams,
                   std::vector<int64_t> offsets, int64_t dist, std::string isa) {
  STD_TORCH_CHECK(streams.size() == sizes.size() && offsets.size() == sizes.size(),
                  "squares: sizes, streams, offsets: expected equal lengths");
  check_dist("squares", dist);
  const int64_t count = seeds.numel();
  std::vector<PhiloxKey> keys;
  for (int64_t k = 0; k < count; ++k) keys.push_back(philox_key(data<uint64_t>(seeds)[k]));
  std::vector<Span> spans;
  int64_t total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    total += sizes[i];
    if (sizes[i] == 0) continue;
    Span span{};
    span.numel = sizes[i];
    span.offset = static_cast<uint64_t>(offsets[i]);
    span.stream = Stream(static_cast<uint64_t>(streams[i]));
    spans.push_back(span);
  }
  Tensor result = torch::stable::empty_like(seeds);
  auto* sums = static_cast<uint64_t*>(result.mutable_data_ptr());
  const bool signs = static_cast<Domain>(dist) == kRademacher;
  std::fill(sums, sums + count, signs ? static_cast<uint64_t>(total) << 20 : 0);
  if (signs) return result;  // every square is 1, so the sum is the number of elements

  Terms terms{};
  terms.keys = keys.data();
  terms.count = count;
  const auto kernel = ZK_KERNEL_OF(squares, isa);
  parallel(SpanList{spans}, 0, [&](const Span& piece, void*) {
    std::vector<uint64_t> part(count);
    kernel(terms, piece, part.data());
    for (int64_t k = 0; k < count; ++k)
      std::atomic_ref(sums[k]).fetch_add(part[k], std::memory_order_relaxed);
  });
  return result;
}

}  // namespace

ZK_REGISTER(squares,
            "squares(Tensor seeds, int[] sizes, int[] streams, int[] offsets, int dist, str isa) -> Tensor")

}  // namespace zk::cpu

#endif
