// low_rank: combine with rows of L_k R_k^T in the place of noise.
#include "combine_kernel.h"

namespace zk::cpu {
namespace {

// The products of a tile, computed in the order of memory, which need not respect rows, and read back as a tile's elements.
template <class L>
struct Products {
  using F = typename L::F;
  static constexpr int64_t size = Tile<L, true>::size;
  const Span span;
  F z[8];

  explicit ZK_HD Products(const Span& span) : span(span) {}
  ZK_HD uint64_t enter(uint64_t, uint64_t stop) { return stop; }

  // N registers of products of one row: right is read along the row for each r.
  template <int N>
  ZK_HD void products(const float* left, const float* right, float* to) const {
    F sum[N];
    for (int j = 0; j < N; ++j) sum[j] = Splat<F>::of(0.0f);
    for (int64_t r = 0; r < span.rank; ++r) {
      const F l = Splat<F>::of(left[r]);
      for (int j = 0; j < N; ++j) sum[j] = fma(l, L::load_row(right + r * span.columns + j * L::width), sum[j]);
    }
    for (int j = 0; j < N; ++j) L::store_row(to + j * L::width, sum[j]);
  }

  template <class Tile>
  ZK_HD void take(int64_t k, const Tile& tile) {
    alignas(64) float buffer[size + 8 * L::width];
    const float* left = span.left + (k * span.rows + tile.first / span.columns) * span.rank;
    const float* right = span.right + k * span.rank * span.columns;
    int64_t from = tile.first % span.columns;
    for (int64_t at = 0; at < tile.count;) {
      const int64_t length = tile.count - at < span.columns - from ? tile.count - at : span.columns - from;
      int64_t j = 0;
      // Past the row's end lie the next one's first elements, or padding: computed, then overwritten.
      for (; j + 8 * L::width <= length; j += 8 * L::width) products<8>(left, right + from + j, buffer + tile.skip + at + j);
      for (; j < length; j += L::width) products<1>(left, right + from + j, buffer + tile.skip + at + j);
      at += length;
      from = 0;
      left += span.rank;
    }
    L::load_floats(buffer, z);
    for (int e = 0; e < 8; ++e) z[e] = without_payload(z[e]);
  }

  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = fma(c, z[e], from[e]);
  }
};

template <class L, DType D>
void run(const Combine& op, const Span& span) {
  const auto begin = [&](uint64_t) ZK_INLINE { return Products<L>(span); };
  combine_tiles<L, D>(span, begin, [op, span](const auto& tile, auto& products) ZK_INLINE {
    op.stochastic ? plain_tile<L, D, true>(op, span, tile, products) : plain_tile<L, D, false>(op, span, tile, products);
  });
}

}  // namespace

void ZK_ISA::low_rank(const Combine& op, const Span& span, void*) {
  switch (op.dtype) {
    case DType::f32: return run<ZK_LANES, DType::f32>(op, span);
    case DType::bf16: return run<ZK_LANES, DType::bf16>(op, span);
    case DType::f16: return run<ZK_LANES, DType::f16>(op, span);
    case DType::i8: return;
  }
}

}  // namespace zk::cpu
