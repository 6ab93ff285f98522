// low_rank_linear: out_p += c_p ((x_p B_p) A_p^T + b_p) for the rows x_p of every member p of a population.
//
// Rows of x, the left factors and biases are held in the order in which Storage (tile.h) has a tensor's elements
// in registers: of each run of 2 L::width the even ones, then the odd ones. So none of them is rearranged where
// it meets a row of out.
#include "kernels.h"

namespace zk::cpu {

// The chains of a sum over the columns of x (docs/contract.md), and the columns of out that are taken at a time.
// What is packed is filled with zeros up to a multiple of these; a row of a right factor up to one of kRanks.
constexpr int64_t kChains = 64, kColumns = 128, kRanks = 16;
// Up to this rank the columns of a right factor are taken one by one, and else side by side in registers.
constexpr int64_t kFewRanks = 4;
// Rows that are taken at a time, so that what is read of the factors serves all of them.
constexpr int64_t kRows = 4;

// Rows of one member. x and out have n and m columns.
struct MemberRows {
  const void* x;
  void* out;
  const float* left;   // [rank, left_stride], packed
  const float* right;  // up to kFewRanks: [rank, x_stride], packed; else [x_stride, right_stride]
  const float* bias;   // [left_stride], packed, or null
  int64_t left_stride, right_stride, x_stride;
  int64_t rows, m, n, rank;
  float coeff;
  bool add;  // out is read
  DType dtype;
};

// scratch: kRows rows of x in fp32, and as many of rank sums; aligned to 64 bytes.
ZK_KERNEL(low_rank_linear, const MemberRows&, void* scratch)

// Packs a factor [columns, rank] as [rank, stride], with zeros behind the columns.
ZK_KERNEL(pack_factor, const float* factor, int64_t columns, int64_t rank, int64_t stride, float* to)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernels, compiled once for each instruction set ----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

// std::integer_sequence, without the standard library's inline code (kernels.h).
template <int... I>
struct Indices {};
template <int N, int... I>
struct FirstIndices : FirstIndices<N - 1, N - 1, I...> {};
template <int... I>
struct FirstIndices<0, I...> {
  using Type = Indices<I...>;
};

template <class F>
ZK_HD F sum_of_four(const F c[4]) {
  return add(add(c[0], c[1]), add(c[2], c[3]));
}

template <class F>
ZK_HD F sum_of_neighbours(const F c[8]) {
  return add(sum_of_four(c), sum_of_four(c + 4));
}

// Where element i is among the packed ones.
template <class L>
constexpr int64_t place(int64_t i) {
  constexpr int64_t run = 2 * L::width;
  return i / run * run + i % 2 * L::width + i % run / 2;
}

// Sums over the columns of `Rows` rows of x with the one column of right. A register holds the chains of even or
// of odd columns.
template <class L, int Rows>
ZK_HD void inner_of_one(const float* x, const float* right, int64_t stride, float* sums, int64_t rank) {
  using F = typename L::F;
  constexpr int registers = kChains / L::width;
  F chain[Rows][registers];
  for (int i = 0; i < Rows; ++i) {
    for (int r = 0; r < registers; ++r) chain[i][r] = Splat<F>::of(0.0f);
  }
  for (int64_t at = 0; at < stride; at += kChains) {
    for (int r = 0; r < registers; ++r) {
      const F b = L::load_row(right + at + r * L::width);
      for (int i = 0; i < Rows; ++i) {
        chain[i][r] = fma(L::load_row(x + i * stride + at + r * L::width), b, chain[i][r]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    alignas(64) float all[kChains / 2];
    for (int r = 0; r < registers; r += 2) {
      L::store_row(all + r / 2 * L::width, add(chain[i][r], chain[i][r + 1]));
    }
    for (int n = kChains / 4; n > 0; n /= 2) {
      for (int k = 0; k < n; ++k) all[k] = all[2 * k] + all[2 * k + 1];
    }
    sums[i * rank] = all[0];
  }
}

// The same with a register for a chain of L::width numbers of the rank; four neighbouring chains at a time.
template <class L, int Rows>
ZK_HD void inner_of_many(const MemberRows& op, const float* x, float* sums) {
  using F = typename L::F;
  for (int64_t rank = 0; rank < op.rank; rank += L::width) {
    F group[Rows][kChains / 4];
    for (int g = 0; g < kChains / 4; ++g) {
      F chain[Rows][4];
      for (int i = 0; i < Rows; ++i) {
        for (int q = 0; q < 4; ++q) chain[i][q] = Splat<F>::of(0.0f);
      }
      for (int64_t at = 4 * g; at < op.x_stride; at += kChains) {
        const float* b = op.right + at * op.right_stride + rank;
        const float* from = x + place<L>(at);
        for (int q = 0; q < 4; ++q) {
          const F value = L::load_row(b + q * op.right_stride);
          // place(at + q) - place(at), where four columns lie in one run
          const int column = L::width == 1 ? q : q % 2 * L::width + q / 2;
          for (int i = 0; i < Rows; ++i) {
            chain[i][q] = fma(Splat<F>::of(from[i * op.x_stride + column]), value, chain[i][q]);
          }
        }
      }
      for (int i = 0; i < Rows; ++i) group[i][g] = sum_of_four(chain[i]);
    }
    for (int i = 0; i < Rows; ++i) {
      alignas(64) float all[L::width];
      L::store_row(all, add(sum_of_neighbours(group[i]), sum_of_neighbours(group[i] + 8)));
      for (int64_t j = 0; j < L::width && rank + j < op.rank; ++j) sums[i * op.rank + rank + j] = all[j];
    }
  }
}

// Adds to 8 L::width columns of a row, from `column` on, what `product` has for them.
template <class L, DType D>
ZK_HD void add_to(const MemberRows& op, typename Storage<L, D>::T* out, int64_t column,
                  const typename L::F product[8]) {
  using F = typename L::F;
  F y[8];
  if (op.add) {
    Storage<L, D>::load(out, y);
  } else {
    for (int v = 0; v < 8; ++v) y[v] = Splat<F>::of(0.0f);
  }
  for (int v = 0; v < 8; ++v) {
    F z = product[v];
    if (op.bias != nullptr) z = add(z, L::load_row(op.bias + column + v * L::width));
    if constexpr (D != DType::f32) z = without_payload(z);  // rounding does not look for NaNs
    y[v] = fma(Splat<F>::of(op.coeff), z, y[v]);
  }
  Storage<L, D>::template store<false>(out, y, {});
}

// The sums of the rank for `Rows` rows and 8 L::width columns from `column` on, added to `count` columns of out.
template <class L, DType D, int Rows>
ZK_HD void outer(const MemberRows& op, const float* sums, typename Storage<L, D>::T* out, int64_t column,
                 int64_t count) {
  using F = typename L::F;
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  F product[Rows][8];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < 8; ++v) product[i][v] = Splat<F>::of(0.0f);
  }
  for (int64_t j = 0; j < op.rank; ++j) {
    const float* a = op.left + j * op.left_stride + column;
    F sum[Rows];
    for (int i = 0; i < Rows; ++i) sum[i] = Splat<F>::of(sums[i * op.rank + j]);
    for (int v = 0; v < 8; ++v) {
      const F value = L::load_row(a + v * L::width);
      for (int i = 0; i < Rows; ++i) product[i][v] = fma(sum[i], value, product[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    T* here = out + i * op.m + column;
    if (count == step) {
      add_to<L, D>(op, here, column, product[i]);
    } else {
      alignas(64) T rest[step] = {};
      __builtin_memcpy(rest, here, count * sizeof(T));
      add_to<L, D>(op, rest, column, product[i]);
      __builtin_memcpy(here, rest, count * sizeof(T));
    }
  }
}

// `count` elements of x in fp32, packed, and zeros behind them up to `stride`.
template <class L, DType D>
ZK_HD void to_floats(const typename Storage<L, D>::T* x, int64_t count, int64_t stride, float* to) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  typename L::F v[8];
  int64_t at = 0;
  for (; at + step <= count; at += step) {
    Storage<L, D>::load(x + at, v);
    for (int e = 0; e < 8; ++e) L::store_row(to + at + e * L::width, v[e]);
  }
  for (; at < stride; at += step) {
    alignas(64) T rest[step] = {};
    if (at < count) __builtin_memcpy(rest, x + at, (count - at) * sizeof(T));
    Storage<L, D>::load(rest, v);
    for (int e = 0; e < 8 && at + e * L::width < stride; ++e) L::store_row(to + at + e * L::width, v[e]);
  }
}

template <class L, DType D, int Rows>
ZK_HD void rows_of(const MemberRows& op, int64_t row, float* scratch) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  float *x = scratch, *sums = scratch + kRows * op.x_stride;
  for (int i = 0; i < Rows; ++i) {
    to_floats<L, D>(static_cast<const T*>(op.x) + (row + i) * op.n, op.n, op.x_stride, x + i * op.x_stride);
  }
  if (op.rank <= kFewRanks) {
    for (int64_t j = 0; j < op.rank; ++j) {
      inner_of_one<L, Rows>(x, op.right + j * op.x_stride, op.x_stride, sums + j, op.rank);
    }
  } else {
    inner_of_many<L, Rows>(op, x, sums);
  }
  // Two rows' products fill half of the registers.
  constexpr int together = L::width == 16 && Rows % 2 == 0 ? 2 : 1;
  T* out = static_cast<T*>(op.out) + row * op.m;
  for (int64_t column = 0; column < op.m; column += step) {
    const int64_t count = op.m - column < step ? op.m - column : step;
    for (int i = 0; i < Rows; i += together) {
      outer<L, D, together>(op, sums + i * op.rank, out + i * op.m, column, count);
    }
  }
}

template <class L, DType D>
void run(const MemberRows& op, float* scratch) {
  constexpr int rows = L::width == 16 ? kRows : 1;
  int64_t row = 0;
  for (; row + rows <= op.rows; row += rows) rows_of<L, D, rows>(op, row, scratch);
  for (; row < op.rows; ++row) rows_of<L, D, 1>(op, row, scratch);
}

// A square of L::width rows of `from`, of which `count` columns become rows of `to`.  In each of log2(width)
// steps registers whose numbers differ in one bit exchange the lanes whose numbers do.
template <class L>
ZK_HD void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t count) {
  constexpr int width = L::width;
  typedef float Lanes __attribute__((vector_size(4 * width)));
  Lanes v[width];
  for (int i = 0; i < width; ++i) __builtin_memcpy(&v[i], from + i * from_stride, sizeof(Lanes));
  const auto exchange = [&]<int Bit, int... I>(Indices<Bit>, Indices<I...>) {
    for (int i = 0; i < width; ++i) {
      if (i & Bit) continue;
      const Lanes a = v[i], b = v[i + Bit];
      v[i] = __builtin_shufflevector(a, b, (I & Bit ? width + I - Bit : I)...);
      v[i + Bit] = __builtin_shufflevector(a, b, (I & Bit ? width + I : I + Bit)...);
    }
  };
  using All = typename FirstIndices<width>::Type;
  if constexpr (width > 1) exchange(Indices<1>{}, All{});
  if constexpr (width > 2) exchange(Indices<2>{}, All{});
  if constexpr (width > 4) exchange(Indices<4>{}, All{});
  if constexpr (width > 8) exchange(Indices<8>{}, All{});
  for (int j = 0; j < count; ++j) __builtin_memcpy(to + j * to_stride, &v[j], sizeof(Lanes));
}

template <class L>
void pack(const float* factor, int64_t columns, int64_t rank, int64_t stride, float* to) {
  if (rank == 1) return to_floats<L, DType::f32>(factor, columns, stride, to);
  constexpr int64_t run = 2 * L::width;
  int64_t at = 0;
  for (; at + run <= columns; at += run) {
    for (int64_t j = 0; j < rank;) {
      const float* from = factor + at * rank + j;
      float* row = to + j * stride + at;
      // Whole registers of ranks, as far as they can be loaded without reading behind the factor.
      const bool inside = (at + run - 1) * rank + j + L::width <= columns * rank;
      if (L::width > 1 && 2 * (rank - j) > L::width && inside) {
        const int64_t count = rank - j < L::width ? rank - j : L::width;
        transpose<L>(from, 2 * rank, row, stride, count);
        transpose<L>(from + rank, 2 * rank, row + L::width, stride, count);
        j += count;
      } else {
        for (int64_t k = 0; k < L::width; ++k) row[k] = from[2 * k * rank];
        for (int64_t k = 0; k < L::width; ++k) row[L::width + k] = from[(2 * k + 1) * rank];
        ++j;
      }
    }
  }
  for (int64_t j = 0; j < rank; ++j) {
    float* row = to + j * stride;
    for (int64_t i = at; i < stride; ++i) row[place<L>(i)] = i < columns ? factor[i * rank + j] : 0.0f;
  }
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

void ZK_ISA::pack_factor(const float* factor, int64_t columns, int64_t rank, int64_t stride, float* to) {
  pack<ZK_LANES>(factor, columns, rank, stride, to);
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What a thread has of its own: kernel scratch, and the factors of one group of members, packed when the thread
// comes to its rows.  So they are in the thread's cache, and no more of them is in memory.  Each part begins at
// a multiple of 64 bytes, so that no register that is loaded lies in two lines of a cache.
class Workspace {
 public:
  explicit Workspace(std::initializer_list<int64_t> counts) {
    int64_t total = 16;
    for (const int64_t count : counts) total += padded(count, 16);
    memory_.reset(new float[total]);
    void* p = memory_.get();
    size_t space = 4 * total;
    auto* part = static_cast<float*>(std::align(64, 4 * (total - 16), p, space));
    for (const int64_t count : counts) {
      parts_.push_back(part);
      part += padded(count, 16);
    }
  }

  float* part(int i) const { return parts_[i]; }

 private:
  std::unique_ptr<float[]> memory_;
  std::vector<float*> parts_;
};

// A right factor [n, rank] as [rows, stride], with zeros in the rest.
void pad_rows(const float* from, int64_t n, int64_t rank, int64_t rows, int64_t stride, float* to) {
  for (int64_t i = 0; i < rows; ++i, to += stride) {
    const int64_t count = i < n ? rank : 0;
    std::copy_n(from + i * rank, count, to);
    std::fill(to + count, to + stride, 0.0f);
  }
}

void low_rank_linear_cpu(Tensor out, Tensor x, Tensor left, Tensor right, Tensor coeffs,
                         std::vector<int64_t> rows, std::optional<Tensor> bias, bool add, std::string isa) {
  check_low_rank_linear(out, x, left, right, coeffs, rows, bias);
  if (out.numel() == 0) return;
  MemberRows all{};
  all.m = out.size(1);
  all.n = x.size(1);
  all.rank = left.size(2);
  all.left_stride = padded(all.m, kColumns);
  all.x_stride = padded(all.n, kChains);
  const bool few = all.rank <= kFewRanks;
  all.right_stride = few ? all.rank : padded(all.rank, kRanks);
  all.dtype = dtype_of(out);
  all.add = add;
  // A right factor of the right size is read where it lies.
  const bool whole = !few && all.right_stride == all.rank && all.x_stride == all.n;
  std::vector<int64_t> starts;  // how many rows lie before each member
  const int64_t members = static_cast<int64_t>(rows.size());
  int64_t total = 0;
  for (const int64_t count : rows) {
    starts.push_back(total);
    total += count;
  }
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t bytes = size_of(all.dtype);
  const int64_t grain = std::max<int64_t>(kRows, kGrain / (all.m + all.n) / all.rank);
  const auto kernel = ZK_KERNEL_OF(low_rank_linear, isa);
  const auto pack = ZK_KERNEL_OF(pack_factor, isa);
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    const Workspace space({kRows * (all.x_stride + all.rank), all.rank * all.left_stride,
                           whole ? 0 : all.right_stride * all.x_stride, bias ? all.left_stride : 0});
    int64_t packed[3] = {-1, -1, -1};  // the groups whose left, right and bias are
    auto p = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++p) {
      const int64_t stop = std::min(end, starts[p] + rows[p]);
      if (stop <= begin) continue;
      // Calls each(what member p has of a factor) where it is not packed; neighbouring members may share it.
      const auto packing = [&](int which, const Tensor& factor, const auto& each) {
        const int64_t group = p * factor.size(0) / members;
        if (packed[which] != group) each(data<float>(factor) + group * (factor.numel() / factor.size(0)));
        packed[which] = group;
      };
      MemberRows piece = all;
      piece.rows = stop - begin;
      piece.x = from + begin * all.n * bytes;
      piece.out = to + begin * all.m * bytes;
      piece.left = space.part(1);
      piece.right = space.part(2);
      packing(0, left, [&](const float* own) { pack(own, all.m, all.rank, all.left_stride, space.part(1)); });
      if (whole) {
        piece.right = data<float>(right) + p * right.size(0) / members * all.n * all.rank;
      } else {
        packing(1, right, [&](const float* own) {
          if (few) return pack(own, all.n, all.rank, all.x_stride, space.part(2));
          pad_rows(own, all.n, all.rank, all.x_stride, all.right_stride, space.part(2));
        });
      }
      if (bias) {
        piece.bias = space.part(3);
        packing(2, *bias, [&](const float* own) { pack(own, all.m, 1, all.left_stride, space.part(3)); });
      }
      piece.coeff = canonical_nan(data<float>(coeffs)[p]);
      kernel(piece, space.part(0));
      begin = stop;
    }
  });
}

}  // namespace

ZK_REGISTER(low_rank_linear,
            "low_rank_linear(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor coeffs, "
            "int[] rows, Tensor? bias, bool add, str isa) -> ()")

}  // namespace zk::cpu

#endif
