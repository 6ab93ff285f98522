// low_rank_linear: out_p += c_p ((x_p B_p) A_p^T + b_p) for the rows x_p of every member p of a population.
#include "kernels.h"

namespace zk::cpu {

// The chains of a sum over the columns of x (docs/contract.md), and the columns of out that are taken at a
// time. Packed factors are filled with zeros up to a multiple of these.
constexpr int64_t kChains = 64, kColumns = 128;

// Rows of one member. x, out, right and left have `n`, `m`, `n` and `m` columns; the factors are transposed.
struct MemberRows {
  const void* x;
  void* out;
  const float* left;   // [rank, left_stride]
  const float* right;  // [rank, right_stride]
  const float* bias;   // [left_stride], or null
  int64_t left_stride, right_stride;
  int64_t rows, m, n, rank;
  float coeff;
  DType dtype;
};

// scratch: two rows of x in fp32, and two rows of rank sums; aligned to 64 bytes.
ZK_KERNEL(low_rank_linear, const MemberRows&, void* scratch)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

// Neighbours are added until one sum is left.
ZK_HD float sum_of_chains(float chain[kChains]) {
  for (int64_t n = kChains / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) chain[i] = chain[2 * i] + chain[2 * i + 1];
  }
  return chain[0];
}

// Sums over the columns of `Rows` rows of x with `Ranks` columns of right, as many chains side by side as
// the registers hold.
template <class L, int Rows, int Ranks>
ZK_HD void inner(const float* x, const float* right, int64_t stride, float* sums, int64_t rank) {
  using F = typename L::F;
  constexpr int registers = kChains / L::width;
  F chain[Rows][Ranks][registers];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Ranks; ++j) {
      for (int r = 0; r < registers; ++r) chain[i][j][r] = Splat<F>::of(0.0f);
    }
  }
  for (int64_t at = 0; at < stride; at += kChains) {
    for (int r = 0; r < registers; ++r) {
      F b[Ranks];
      for (int j = 0; j < Ranks; ++j) b[j] = L::load_row(right + j * stride + at + r * L::width);
      for (int i = 0; i < Rows; ++i) {
        const F value = L::load_row(x + i * stride + at + r * L::width);
        for (int j = 0; j < Ranks; ++j) chain[i][j][r] = fma(value, b[j], chain[i][j][r]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Ranks; ++j) {
      alignas(64) float all[kChains];
      for (int r = 0; r < registers; ++r) L::store_row(all + r * L::width, chain[i][j][r]);
      sums[i * rank + j] = sum_of_chains(all);
    }
  }
}

// The sums of the rank for `Rows` rows and 8 L::width columns from `column` on.
template <class L, int Rows>
ZK_HD void outer(const MemberRows& op, const float* sums, int64_t column, float* to) {
  using F = typename L::F;
  F product[Rows][8];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < 8; ++v) product[i][v] = Splat<F>::of(0.0f);
  }
  for (int64_t j = 0; j < op.rank; ++j) {
    const float* a = op.left + j * op.left_stride + column;
    for (int v = 0; v < 8; ++v) {
      const F value = L::load_row(a + v * L::width);
      for (int i = 0; i < Rows; ++i) {
        product[i][v] = fma(Splat<F>::of(sums[i * op.rank + j]), value, product[i][v]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < 8; ++v) {
      F value = product[i][v];
      if (op.bias != nullptr) value = add(value, L::load_row(op.bias + column + v * L::width));
      L::store_row(to + (i * 8 + v) * L::width, value);
    }
  }
}

template <class L, DType D>
ZK_HD void add_to(typename Storage<L, D>::T* out, const float* product, float coeff) {
  using F = typename L::F;
  F y[8], z[8];
  Storage<L, D>::load(out, y);
  Storage<L, DType::f32>::load(product, z);
  for (int e = 0; e < 8; ++e) {
    if constexpr (D != DType::f32) z[e] = without_payload(z[e]);  // rounding does not look for NaNs
    y[e] = fma(Splat<F>::of(coeff), z[e], y[e]);
  }
  Storage<L, D>::template store<false>(out, y, {});
}

// `count` elements of x in fp32, and zeros behind them up to `stride`.
template <class L, DType D>
ZK_HD void to_floats(const typename Storage<L, D>::T* x, int64_t count, int64_t stride, float* to) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  typename L::F v[8];
  int64_t at = 0;
  for (; at + step <= count; at += step) {
    Storage<L, D>::load(x + at, v);
    Storage<L, DType::f32>::template store<false>(to + at, v, {});
  }
  if (at == stride) return;
  alignas(64) T rest[step] = {};
  alignas(64) float floats[step];
  __builtin_memcpy(rest, x + at, (count - at) * sizeof(T));
  Storage<L, D>::load(rest, v);
  Storage<L, DType::f32>::template store<false>(floats, v, {});
  for (int64_t i = 0; at + i < stride; ++i) to[at + i] = i < step ? floats[i] : 0.0f;
}

template <class L, DType D, int Rows>
ZK_HD void rows_of(const MemberRows& op, int64_t row, float* scratch) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  constexpr int ranks = L::width == 16 ? 2 : 1;
  float *x = scratch, *sums = scratch + 2 * op.right_stride;
  for (int i = 0; i < Rows; ++i) {
    to_floats<L, D>(static_cast<const T*>(op.x) + (row + i) * op.n, op.n, op.right_stride,
                    x + i * op.right_stride);
  }
  int64_t j = 0;
  for (; j + ranks <= op.rank; j += ranks) {
    inner<L, Rows, ranks>(x, op.right + j * op.right_stride, op.right_stride, sums + j, op.rank);
  }
  for (; j < op.rank; ++j) {
    inner<L, Rows, 1>(x, op.right + j * op.right_stride, op.right_stride, sums + j, op.rank);
  }
  T* out = static_cast<T*>(op.out) + row * op.m;
  alignas(64) float product[Rows * step];
  int64_t column = 0;
  for (; column + step <= op.m; column += step) {
    outer<L, Rows>(op, sums, column, product);
    for (int i = 0; i < Rows; ++i) add_to<L, D>(out + i * op.m + column, product + i * step, op.coeff);
  }
  if (column == op.m) return;
  outer<L, Rows>(op, sums, column, product);
  for (int i = 0; i < Rows; ++i) {
    alignas(64) T rest[step] = {};
    T* here = out + i * op.m + column;
    __builtin_memcpy(rest, here, (op.m - column) * sizeof(T));
    add_to<L, D>(rest, product + i * step, op.coeff);
    __builtin_memcpy(here, rest, (op.m - column) * sizeof(T));
  }
}

template <class L, DType D>
void run(const MemberRows& op, float* scratch) {
  constexpr int rows = L::width == 16 ? 2 : 1;
  int64_t row = 0;
  for (; row + rows <= op.rows; row += rows) rows_of<L, D, rows>(op, row, scratch);
  for (; row < op.rows; ++row) rows_of<L, D, 1>(op, row, scratch);
}

}  // namespace

void ZK_ISA::low_rank_linear(const MemberRows& op, void* scratch) {
  auto* floats = static_cast<float*>(scratch);
  switch (op.dtype) {
    case DType::f32: return run<ZK_LANES, DType::f32>(op, floats);
    case DType::bf16: return run<ZK_LANES, DType::bf16>(op, floats);
    case DType::f16: return run<ZK_LANES, DType::f16>(op, floats);
    default: return;
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// factor [P, columns, rank] as [P, rank, stride], with zeros behind the columns.
std::unique_ptr<float[]> transposed(const Tensor& factor, int64_t stride) {
  const int64_t members = factor.size(0), columns = factor.size(1), rank = factor.size(2);
  std::unique_ptr<float[]> packed(new float[members * rank * stride]);
  const float* from = data<float>(factor);
  float* to = packed.get();
  torch::stable::parallel_for(0, members, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns * rank)),
                              [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t j = 0; j < rank; ++j) {
        float* row = to + (p * rank + j) * stride;
        const float* column = from + p * columns * rank + j;
        for (int64_t i = 0; i < columns; ++i) row[i] = column[i * rank];
        std::fill(row + columns, row + stride, 0.0f);
      }
    }
  });
  return packed;
}

void low_rank_linear_cpu(Tensor out, Tensor x, Tensor left, Tensor right, Tensor coeffs,
                         std::vector<int64_t> rows, std::optional<Tensor> bias, std::string isa) {
  check_low_rank_linear(out, x, left, right, coeffs, rows, bias);
  if (out.numel() == 0) return;
  MemberRows all{};
  all.m = out.size(1);
  all.n = x.size(1);
  all.rank = left.size(2);
  all.left_stride = padded(all.m, kColumns);
  all.right_stride = padded(all.n, kChains);
  all.dtype = dtype_of(out);
  const auto lefts = transposed(left, all.left_stride), rights = transposed(right, all.right_stride);
  std::unique_ptr<float[]> biases;
  if (bias) {
    const int64_t members = bias->size(0);
    biases.reset(new float[members * all.left_stride]());
    for (int64_t p = 0; p < members; ++p) {
      std::copy_n(data<float>(*bias) + p * all.m, all.m, biases.get() + p * all.left_stride);
    }
  }
  std::vector<int64_t> starts;  // how many rows lie before each member
  int64_t total = 0;
  for (const int64_t count : rows) {
    starts.push_back(total);
    total += count;
  }
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t bytes = size_of(all.dtype), scratch_size = 4 * (2 * all.right_stride + 2 * all.rank);
  const int64_t grain = std::max<int64_t>(2, kGrain / (all.m + all.n) / all.rank);
  const auto kernel = ZK_KERNEL_OF(low_rank_linear, isa);
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<std::byte[]> memory(new std::byte[scratch_size + 64]);
    void* scratch = memory.get();
    size_t space = scratch_size + 64;
    std::align(64, scratch_size, scratch, space);
    auto p = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++p) {
      const int64_t stop = std::min(end, starts[p] + rows[p]);
      if (stop <= begin) continue;
      MemberRows piece = all;
      piece.rows = stop - begin;
      piece.x = from + begin * all.n * bytes;
      piece.out = to + begin * all.m * bytes;
      piece.left = lefts.get() + (left.size(0) == 1 ? 0 : p) * all.rank * all.left_stride;
      piece.right = rights.get() + (right.size(0) == 1 ? 0 : p) * all.rank * all.right_stride;
      if (bias) piece.bias = biases.get() + (bias->size(0) == 1 ? 0 : p) * all.left_stride;
      piece.coeff = canonical_nan(data<float>(coeffs)[p]);
      kernel(piece, scratch);
      begin = stop;
    }
  });
}

}  // namespace

ZK_REGISTER(low_rank_linear,
            "low_rank_linear(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor coeffs, "
            "int[] rows, Tensor? bias, str isa) -> ()")

}  // namespace zk::cpu

#endif
