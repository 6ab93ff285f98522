// low_rank: combine with the products L_k R_k^T in place of noise. The products are computed for one block of
// rows and columns at a time.
#include "combine.h"

namespace zk::cpu {

// `right` is rearranged into panels: kPanel columns whose values of one rank lie next to each other.
constexpr int64_t kPanel = 64;
constexpr int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// kBlock products of a direction (32 KiB) are computed at a time. The scratch has kProducts floats for each
// direction, since the last panel of a block may reach beyond it.
constexpr int64_t kBlock = 8192, kProducts = kBlock + kPanel;

ZK_KERNEL(low_rank, const Combine&, const Span&, void* scratch)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "combine_kernel.h"

namespace zk::cpu {
namespace {

// The largest width of a block. Wide blocks read and write the parameters in long pieces; high blocks use a
// panel for more rows. fp32 [1024, 1024] of rank 1 takes 0.159 ns an element in blocks of 8 x 512 and 0.135
// in 4 x 2048, and [1000, 4096] of rank 64 takes 1.04 in 4 x 1024 and 0.80 in 4 x 2048.
constexpr int64_t kBlockColumns = 2048;

// Computes `Rows` rows of products with one panel of right. Each product is a chain of fmas; as many chains
// run side by side as the registers hold. Where a row ends inside the panel, the values beyond its end are
// stored as well. They land behind the block, or on products that are computed later: columns go from the
// last to the first, and rows from the first to the last.
template <class L, int Rows>
ZK_HD void multiply(const float* left, const float* panel, int64_t rank, float* to, int64_t stride) {
  using F = typename L::F;
  constexpr int registers = L::width == 8 ? 2 : 4, columns = registers * L::width;
  for (int64_t at = kPanel - columns; at >= 0; at -= columns) {
    F sum[Rows][registers];
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < registers; ++j) sum[i][j] = Splat<F>::of(0.0f);
    }
    for (int64_t r = 0; r < rank; ++r) {
      for (int j = 0; j < registers; ++j) {
        const F x = L::load_row(panel + r * kPanel + at + j * L::width);
        for (int i = 0; i < Rows; ++i) sum[i][j] = fma(Splat<F>::of(left[i * rank + r]), x, sum[i][j]);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < registers; ++j) L::store_row(to + i * stride + at + j * L::width, sum[i][j]);
    }
  }
}

// Computes the products of `rows` rows from `row` on and `columns` columns from `column` on, stored row by
// row.
template <class L>
__attribute__((noinline)) void multiply_block(const Span& span, int64_t k, int64_t row, int64_t rows,
                                              int64_t column, int64_t columns, float* to) {
  const int64_t panels = panels_of(span.columns), rank = span.rank;
  const float* left = span.left + (k * span.rows + row) * rank;
  for (int64_t p = (column + columns - 1) / kPanel; p >= column / kPanel; --p) {
    const float* panel = span.right + (k * panels + p) * rank * kPanel;
    float* corner = to + p * kPanel - column;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) multiply<L, 4>(left + i * rank, panel, rank, corner + i * columns, columns);
    for (; i < rows; ++i) multiply<L, 1>(left + i * rank, panel, rank, corner + i * columns, columns);
  }
}

// Takes the place of Noise (tile.h): the products [direction][kProducts] of the elements from `origin` on.
template <class L, DType D>
struct Products {
  using F = typename L::F;
  const float* products;
  int64_t origin;
  F z[8];

  ZK_HD Products(const float* products, int64_t origin) : products(products), origin(origin) {}
  ZK_HD uint64_t enter(uint64_t, uint64_t stop) { return stop; }
  template <class Tile>
  ZK_HD void take(int64_t k, const Tile& tile) {
    load<L, DType::f32>(products + k * kProducts, tile.from(origin), z);
    if constexpr (D != DType::f32) {  // because rounding does not look for NaNs
      for (int e = 0; e < 8; ++e) z[e] = without_payload(z[e]);
    }
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = fma(c, z[e], from[e]);
  }
};

template <class L, DType D>
void run(const Combine& op, const Span& span, float* scratch) {
  const int64_t n = span.columns, width = n < kBlockColumns ? n : kBlockColumns, height = kBlock / width;
  const auto elements = [&](const float* products, int64_t origin, int64_t count) {
    Span piece = span;
    piece.begin = origin > span.begin ? origin : span.begin;
    piece.end = origin + count < span.end ? origin + count : span.end;
    if (piece.begin >= piece.end) return;
    const auto begin = [&](uint64_t) ZK_INLINE { return Products<L, D>(products, origin); };
    combine_tiles<L, D>(piece, begin, [op, piece](const auto& tile, auto& noise) ZK_INLINE {
      op.stochastic ? plain_tile<L, D, true>(op, piece, tile, noise)
                    : plain_tile<L, D, false>(op, piece, tile, noise);
    });
  };
  const int64_t stop = (span.end + n - 1) / n;
  for (int64_t row = span.begin / n; row < stop; row += height) {
    const int64_t rows = stop - row < height ? stop - row : height;
    for (int64_t column = 0; column < n; column += width) {
      const int64_t columns = n - column < width ? n - column : width;
      for (int64_t k = 0; k < op.count; ++k) {
        multiply_block<L>(span, k, row, rows, column, columns, scratch + k * kProducts);
      }
      if (columns == n) {  // whole rows lie end to end
        elements(scratch, row * n, rows * n);
      } else {
        for (int64_t i = 0; i < rows; ++i) elements(scratch + i * columns, (row + i) * n + column, columns);
      }
    }
  }
}

}  // namespace

void ZK_ISA::low_rank(const Combine& op, const Span& span, void* scratch) {
  auto* products = static_cast<float*>(scratch);
  switch (op.dtype) {
    case DType::f32: return run<ZK_LANES, DType::f32>(op, span, products);
    case DType::bf16: return run<ZK_LANES, DType::bf16>(op, span, products);
    case DType::f16: return run<ZK_LANES, DType::f16>(op, span, products);
    default: return;
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

// Rearranges right [K, n, r] into the panels of Span::right.
void pack_panels(const float* right, int64_t count, int64_t columns, int64_t rank, float* to) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t column = 0; column < panels_of(columns) * kPanel; ++column) {
      float* panel = to + (k * panels_of(columns) + column / kPanel) * rank * kPanel + column % kPanel;
      for (int64_t r = 0; r < rank; ++r) {
        panel[r * kPanel] = column < columns ? right[(k * columns + column) * rank + r] : 0.0f;
      }
    }
  }
}

void low_rank_cpu(TensorList out, TensorList params, TensorList left, TensorList right, ZK_TERMS_PARAMS,
                  std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("low_rank", args);
  check_params("low_rank", out, params, args);
  check_factors(left, right, params, args);
  std::vector<std::unique_ptr<float[]> > panels;
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t i) {
    span.out = out[i].mutable_data_ptr();
    span.rows = left[i].size(1);
    span.columns = right[i].size(1);
    span.rank = left[i].size(2);
    span.left = data<float>(left[i]);
    const int64_t count = args.seeds.numel();
    panels.emplace_back(new float[count * panels_of(span.columns) * kPanel * span.rank]);
    pack_panels(data<float>(right[i]), count, span.columns, span.rank, panels.back().get());
    span.right = panels.back().get();
  });
  call.run(Combine{{call.terms}, Form::one, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(low_rank, isa),
           kProducts * sizeof(float));
}

}  // namespace

ZK_REGISTER(low_rank,
            "low_rank(Tensor(a!)[] out, Tensor[] params, Tensor[] left, Tensor[] right, " ZK_TERMS_SCHEMA
            ", str isa) -> ()")

}  // namespace zk::cpu

#endif
