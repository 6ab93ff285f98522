// squares: integer sums of the directions' squares, the same in any order.
#include "tile.h"

namespace zk::cpu {
namespace {

template <class L>
void run(const Terms& op, const Span& span, uint64_t* sums) {
  constexpr int64_t size = Tile<L, true>::size;
  using F = typename L::F;
  using U = typename L::U;
  const auto begin = [&](uint64_t block)
                         ZK_INLINE { return Noise<L, kNormal>(op.keys, op.count, span.stream, block, nullptr); };
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
