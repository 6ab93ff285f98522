// low_rank_linear: out_p += c_p ((x_p B_p) A_p^T + b_p) for the rows x_p of every member p of a population.
//
// Rows of x, the left factors and biases are held in the order in which Storage (tile.h) has a tensor's elements
// in registers: of each run of 2 L::width the even ones, then the odd ones. So none of them is rearranged where
// it meets a row of out.
//
// The sums over the columns of x come first, for up to kChunk rows that share their factors. Then out is taken in
// blocks of columns: what a block needs of the left factor is packed once, stays in the cache, and serves
// all of these rows.
#include "kernels.h"

namespace zk::cpu {

// The chains of a sum over the columns of x (docs/contract.md), and the columns of out that are taken at a time.
// What is packed is filled with zeros up to a multiple of these.
constexpr int64_t kChains = 64, kColumns = 128;
// Rows and columns of a right factor that are taken at a time, so that what is loaded serves several fmas; and the
// rows of a chunk.
constexpr int64_t kRows = 4, kRanks = 4, kChunk = 64;
// Floats of a left factor that are packed at a time: a quarter of a second cache. With smaller blocks rows of out
// are written in shorter runs: 4096 floats take 1.8 times as long for 49152 columns at rank 1.
constexpr int64_t kBlock = 65536;

// Rows of a chunk, whose members share their factors. x and out have n and m columns.
struct SharedRows {
  const void* x;
  void* out;
  const float* left;    // [m, rank]
  const float* right;   // [rank, x_stride], packed
  const float* bias;    // [m], or null
  const float* coeffs;  // of each row
  int64_t x_stride, rows, m, n, rank;
  bool add;  // out is read
  DType dtype;
  float *floats, *sums, *block, *bias_block;  // scratch, aligned to 64 bytes (Workspace)
};

// The columns of a block, at most.
constexpr int64_t block_columns(int64_t rank) {
  const int64_t columns = kBlock / rank / kColumns * kColumns;
  return columns > kColumns ? columns : kColumns;
}

ZK_KERNEL(low_rank_linear, const SharedRows&)

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

// Whether a NaN may be among eight registers: where it is not cheap to know, one may.
template <class F>
ZK_HD bool may_be_nan(const F*) {
  return true;
}

// Where element i is among the packed ones.
template <class L>
constexpr int64_t place(int64_t i) {
  constexpr int64_t run = 2 * L::width;
  return i / run * run + i % 2 * L::width + i % run / 2;
}

template <class L>
struct Vectors {
  static constexpr int width = L::width;
  typedef float Lanes __attribute__((vector_size(4 * width)));

  // Of two registers in a row: the elements of even numbers, or (`Odd`) of odd ones.
  template <int Odd>
  static ZK_HD Lanes every_second(const Lanes& a, const Lanes& b) {
    return pick(a, b, [&]<int... I>(Indices<I...>) ZK_INLINE {
      return __builtin_shufflevector(a, b, (2 * I + Odd)...);
    });
  }

 private:
  template <class F>
  static ZK_HD Lanes pick(const Lanes&, const Lanes&, const F& shuffled) {
    return shuffled(typename FirstIndices<width>::Type{});
  }
};

// `Count` registers in a row: neighbouring elements are added, `Times` times. The sums lie in the first elements.
template <class L, int Count, int Times>
ZK_HD void sum_neighbours(typename Vectors<L>::Lanes* v) {
  using V = Vectors<L>;
  if constexpr (Times > 0) {
    constexpr int half = Count > 1 ? Count / 2 : 1;
#pragma GCC unroll 32
    for (int i = 0; i < half; ++i) {
      const auto a = v[2 * i < Count ? 2 * i : 0], b = v[2 * i + 1 < Count ? 2 * i + 1 : 0];
      v[i] = V::template every_second<0>(a, b) + V::template every_second<1>(a, b);
    }
    sum_neighbours<L, half, Times - 1>(v);
  }
}

// Sums over the columns of `Rows` rows of x with `Ranks` columns of right, which are packed [Ranks, stride].  A
// register holds chains of even or of odd columns.  One register's chains of all rows and ranks are summed at a
// time, so that what is loaded serves Rows or Ranks fmas.
template <class L, int Rows, int Ranks>
ZK_HD void inner_block(const float* x, const float* right, int64_t stride, float* sums, int64_t rank) {
  using F = typename L::F;
  using Lanes = typename Vectors<L>::Lanes;
  constexpr int registers = kChains / L::width, cells = Rows * Ranks, count = cells * registers / 2;
  const auto chains = [&](int r, F* chain) ZK_INLINE {
#pragma GCC unroll 32
    for (int c = 0; c < cells; ++c) chain[c] = Splat<F>::of(0.0f);
    for (int64_t at = r * L::width; at < stride; at += kChains) {
      F b[Ranks];
#pragma GCC unroll 32
      for (int k = 0; k < Ranks; ++k) b[k] = L::load_row(right + k * stride + at);
#pragma GCC unroll 32
      for (int i = 0; i < Rows; ++i) {
        const F value = L::load_row(x + i * stride + at);
#pragma GCC unroll 32
        for (int k = 0; k < Ranks; ++k) chain[i * Ranks + k] = fma(value, b[k], chain[i * Ranks + k]);
      }
    }
  };
  // Even and odd columns are neighbours: of each cell kChains / 2 sums are left.
  Lanes pairs[count];
  for (int r = 0; r < registers; r += 2) {
    F even[cells], odd[cells];
    chains(r, even);
    chains(r + 1, odd);
#pragma GCC unroll 32
    for (int c = 0; c < cells; ++c) {
      const F sum = add(even[c], odd[c]);
      __builtin_memcpy(&pairs[(c * registers + r) / 2], &sum, sizeof(sum));
    }
  }
  alignas(64) float all[cells < L::width ? L::width : cells];
  if constexpr (L::width == 1) {
    auto* v = reinterpret_cast<float*>(pairs);
    for (int n = count / 2; n >= cells; n /= 2) {
      for (int k = 0; k < n; ++k) v[k] = v[2 * k] + v[2 * k + 1];
    }
    for (int c = 0; c < cells; ++c) all[c] = v[c];
  } else {
    sum_neighbours<L, count, 5>(pairs);  // kChains / 2 is 2^5
    for (int i = 0; i * L::width < cells; ++i) __builtin_memcpy(all + i * L::width, &pairs[i], sizeof(Lanes));
  }
  for (int i = 0; i < Rows; ++i) {
    for (int k = 0; k < Ranks; ++k) sums[i * rank + k] = all[i * Ranks + k];
  }
}

// Adds to 8 L::width columns of a row what `product` has for them; `bias` is packed, or null.
template <class L, DType D>
ZK_HD void add_to(const SharedRows& op, typename Storage<L, D>::T* out, const float* bias, float coeff,
                  typename L::F product[8]) {
  using F = typename L::F;
  const F c = Splat<F>::of(coeff);
  if (bias != nullptr) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) product[v] = add(product[v], L::load_row(bias + v * L::width));
  }
  if (D != DType::f32 && may_be_nan(product)) {  // rounding does not look for NaNs
    for (int v = 0; v < 8; ++v) product[v] = without_payload(product[v]);
  }
  if (op.add) {
    F y[8];
    Storage<L, D>::load(out, y);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) product[v] = fma(c, product[v], y[v]);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) product[v] = fma(c, product[v], Splat<F>::of(0.0f));
  }
  Storage<L, D>::template store<false>(out, product, {});
}

// What the sums of `Rows` rows from `row` on and columns [at, at + 8 L::width) of a block give, added to `count`
// columns of `out`, which is where the first of these rows has them.
template <class L, DType D, int Rows>
ZK_HD void outer(const SharedRows& op, int64_t row, int64_t at, int64_t stride,
                 typename Storage<L, D>::T* out, int64_t count) {
  using F = typename L::F;
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  const float *sums = op.sums + row * op.rank, *a = op.block + at;
  F product[Rows][8];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) product[i][v] = Splat<F>::of(0.0f);
  }
  for (int64_t j = 0; j < op.rank; ++j, ++sums, a += stride) {
    F sum[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) sum[i] = Splat<F>::of(sums[i * op.rank]);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const F value = L::load_row(a + v * L::width);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) product[i][v] = fma(sum[i], value, product[i][v]);
    }
  }
  const float* bias = op.bias == nullptr ? nullptr : op.bias_block + at;
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    T* here = out + i * op.m;
    if (count == step) {
      add_to<L, D>(op, here, bias, op.coeffs[row + i], product[i]);
    } else {
      alignas(64) T rest[step] = {};
      if (op.add) __builtin_memcpy(rest, here, count * sizeof(T));
      add_to<L, D>(op, rest, bias, op.coeffs[row + i], product[i]);
      if (count == step / 2) {  // of a size that is known, no function is called
        __builtin_memcpy(here, rest, step / 2 * sizeof(T));
      } else {
        __builtin_memcpy(here, rest, count * sizeof(T));
      }
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

// The same for 2 L::width rows of a factor of `Rank` columns, a power of two: what is left when elements of even
// numbers have gone in front of those of odd ones so often is [parity of the row, column, half of the row].
template <class L, int Rank>
ZK_HD void take_apart(const float* from, float* to, int64_t to_stride) {
  using V = Vectors<L>;
  typename V::Lanes v[2 * Rank], next[2 * Rank];
  __builtin_memcpy(v, from, sizeof(v));
  for (int done = 1; done <= Rank; done *= 2) {
    for (int i = 0; i < Rank; ++i) {
      next[i] = V::template every_second<0>(v[2 * i], v[2 * i + 1]);
      next[Rank + i] = V::template every_second<1>(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2 * Rank; ++i) v[i] = next[i];
  }
  for (int i = 0; i < 2 * Rank; ++i) {
    __builtin_memcpy(to + i % Rank * to_stride + i / Rank * L::width, &v[i], sizeof(v[i]));
  }
}

// `columns` rows of a factor, behind which `more` are in memory, too.
template <class L>
void pack(const float* factor, int64_t columns, int64_t more, int64_t rank, int64_t stride, float* to) {
  if (rank == 1) return to_floats<L, DType::f32>(factor, columns, stride, to);
  constexpr int64_t run = 2 * L::width;
  int64_t at = 0;
  for (; at + run <= columns; at += run) {
    if constexpr (L::width > 1) {
      if (rank == 2) take_apart<L, 2>(factor + at * rank, to + at, stride);
      if (rank == 4) take_apart<L, 4>(factor + at * rank, to + at, stride);
      if (rank == 8) take_apart<L, 8>(factor + at * rank, to + at, stride);
      if (rank == 2 || rank == 4 || rank == 8) continue;
    }
    for (int64_t j = 0; j < rank;) {
      const float* from = factor + at * rank + j;
      float* row = to + j * stride + at;
      // Whole registers of ranks, as far as they can be loaded without reading behind the factor.
      const bool inside = (at + run - 1) * rank + j + L::width <= (columns + more) * rank;
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

// The sums of `Rows` rows from `row` on.
template <class L, DType D, int Rows>
ZK_HD void inner(const SharedRows& op, int64_t row) {
  using T = typename Storage<L, D>::T;
  for (int i = 0; i < Rows; ++i) {
    const T* x = static_cast<const T*>(op.x) + (row + i) * op.n;
    to_floats<L, D>(x, op.n, op.x_stride, op.floats + i * op.x_stride);
  }
  float* sums = op.sums + row * op.rank;
  int64_t j = 0;
  if constexpr (Rows > 1) {
    for (; j + kRanks <= op.rank; j += kRanks) {
      inner_block<L, Rows, kRanks>(op.floats, op.right + j * op.x_stride, op.x_stride, sums + j, op.rank);
    }
  }
  for (; j < op.rank; ++j) {
    inner_block<L, Rows, 1>(op.floats, op.right + j * op.x_stride, op.x_stride, sums + j, op.rank);
  }
}

template <class L, DType D>
void run(const SharedRows& op) {
  using T = typename Storage<L, D>::T;
  constexpr int rows = L::width > 1 ? kRows : 1;
  int64_t row = 0;
  for (; row + rows <= op.rows; row += rows) inner<L, D, rows>(op, row);
  for (; row < op.rows; ++row) inner<L, D, 1>(op, row);

  constexpr int64_t step = 8 * L::width;
  // Two rows' products fill half of the registers.
  constexpr int together = L::width == 16 ? 2 : 1;
  const int64_t width = block_columns(op.rank);
  for (int64_t begin = 0; begin < op.m; begin += width) {
    const int64_t columns = op.m - begin < width ? op.m - begin : width, rest = op.m - begin - columns;
    const int64_t stride = (columns + kColumns - 1) / kColumns * kColumns;
    pack<L>(op.left + begin * op.rank, columns, rest, op.rank, stride, op.block);
    if (op.bias != nullptr) pack<L>(op.bias + begin, columns, rest, 1, stride, op.bias_block);
    for (row = 0; row < op.rows; row += kRows) {
      const int64_t stop = op.rows - row < kRows ? op.rows : row + kRows;
      for (int64_t at = 0; at < columns; at += step) {
        const int64_t count = columns - at < step ? columns - at : step;
        T* out = static_cast<T*>(op.out) + row * op.m + begin + at;
        int64_t i = row;
        for (; i + together <= stop; i += together, out += together * op.m) {
          outer<L, D, together>(op, i, at, stride, out, count);
        }
        for (; i < stop; ++i, out += op.m) outer<L, D, 1>(op, i, at, stride, out, count);
      }
    }
  }
}

}  // namespace

void ZK_ISA::low_rank_linear(const SharedRows& op) {
  switch (op.dtype) {
    case DType::f32: return run<ZK_LANES, DType::f32>(op);
    case DType::bf16: return run<ZK_LANES, DType::bf16>(op);
    case DType::f16: return run<ZK_LANES, DType::f16>(op);
    default: return;
  }
}

void ZK_ISA::pack_factor(const float* factor, int64_t columns, int64_t rank, int64_t stride, float* to) {
  pack<ZK_LANES>(factor, columns, 0, rank, stride, to);
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What a thread has of its own: kernel scratch, and the right factor of one group of members, packed when the
// thread comes to its rows.  So it is in the thread's cache, and no more of it is in memory.  Each part begins at
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

void low_rank_linear_cpu(Tensor out, Tensor x, Tensor left, Tensor right, Tensor coeffs,
                         std::vector<int64_t> rows, std::optional<Tensor> bias, bool add, std::string isa) {
  check_low_rank_linear(out, x, left, right, coeffs, rows, bias);
  if (out.numel() == 0) return;
  SharedRows all{};
  all.m = out.size(1);
  all.n = x.size(1);
  all.rank = left.size(2);
  all.x_stride = padded(all.n, kChains);
  all.dtype = dtype_of(out);
  all.add = add;
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
  const int64_t block = std::min(block_columns(all.rank), padded(all.m, kColumns));
  const int64_t grain = std::max<int64_t>(kRows, kGrain / (all.m + all.n) / all.rank);
  const auto kernel = ZK_KERNEL_OF(low_rank_linear, isa);
  const auto pack = ZK_KERNEL_OF(pack_factor, isa);
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    const Workspace space({kRows * all.x_stride, kChunk * all.rank, all.rank * block, bias ? block : 0,
                           kChunk, all.rank * all.x_stride});
    // Neighbouring members may share a factor.
    const auto of_member = [&](const Tensor& factor, int64_t p) {
      return data<float>(factor) + p * factor.size(0) / members * (factor.numel() / factor.size(0));
    };
    SharedRows piece = all;
    piece.floats = space.part(0);
    piece.sums = space.part(1);
    piece.block = space.part(2);
    piece.bias_block = space.part(3);
    piece.coeffs = space.part(4);
    piece.right = space.part(5);
    const float* packed = nullptr;  // the right factor that is in space
    const auto finish = [&] {
      if (piece.rows == 0) return;
      piece.x = from + begin * all.n * bytes;
      piece.out = to + begin * all.m * bytes;
      kernel(piece);
      begin += piece.rows;
      piece.rows = 0;
    };
    auto p = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t row = begin; row < end; ++p) {
      const int64_t stop = std::min(end, starts[p] + rows[p]);
      if (stop <= row) continue;
      const float *own_left = of_member(left, p), *own_right = of_member(right, p);
      const float* own_bias = bias ? of_member(*bias, p) : nullptr;
      if (own_left != piece.left || own_bias != piece.bias || own_right != packed) finish();
      piece.left = own_left;
      piece.bias = own_bias;
      if (own_right != packed) pack(own_right, all.n, all.rank, all.x_stride, space.part(5));
      packed = own_right;
      for (const float coeff = canonical_nan(data<float>(coeffs)[p]); row < stop;) {
        const int64_t count = std::min(stop - row, kChunk - piece.rows);
        std::fill_n(space.part(4) + piece.rows, count, coeff);
        piece.rows += count;
        row += count;
        if (piece.rows == kChunk) finish();
      }
    }
    finish();
  });
}

}  // namespace

ZK_REGISTER(low_rank_linear,
            "low_rank_linear(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor coeffs, "
            "int[] rows, Tensor? bias, bool add, str isa) -> ()")

}  // namespace zk::cpu

#endif
