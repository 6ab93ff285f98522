// low_rank: theta = round(decay * theta + sum_k c_k L_k R_k^T) for matrices.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

// A warp owns kRowsOfWarp rows of 256 columns. What it reads of R serves kRowsAtOnce rows from registers.
constexpr int kRowsAtOnce = 4;
constexpr int kRowsOfWarp = 8;
constexpr int64_t kChunkRows = kWarps * kRowsOfWarp, kChunkColumns = 32 * kVector;

struct LowRankEntry {
  const void* in;
  void* out;
  const float* left;    // [K, rows, rank]
  const float* right;   // [K, columns, rank]
  const float* coeffs;  // [K]
  int64_t rows, columns;
  uint64_t offset;  // logical index of element 0
  int32_t rank;
  bool has_vectors;  // whether rows are whole vectors; others go element by element, in chunks as of noise
};

struct LowRankLaunch {
  const float* decay;            // null: none
  const int64_t* rounding_seed;  // null: nearest
  int32_t count;                 // K
  Table<LowRankEntry> table;
};
static_assert(sizeof(LowRankLaunch) <= kMaxArgument);

// Whether every row consists of whole vectors at aligned addresses that are Philox blocks.
inline bool rows_are_vectors(const LowRankEntry& t) {
  const auto all = reinterpret_cast<uint64_t>(t.in) | reinterpret_cast<uint64_t>(t.out);
  return (all % 16 | static_cast<uint64_t>(t.columns) % kVector | t.offset % kVector) == 0;
}

// Chunks are numbered across the columns first, so that neighbouring thread blocks work on the same rows.
constexpr int64_t low_rank_chunks(const LowRankEntry& t) {
  if (!t.has_vectors) return chunks_of(t.offset, t.rows * t.columns, kNormal);
  return (t.rows + kChunkRows - 1) / kChunkRows * ((t.columns + kChunkColumns - 1) / kChunkColumns);
}

// --- the kernel ------------------------------------------------------------------------------------------

// low_rank on the device. A thread owns eight columns in several rows, so that what it reads of R serves all
// of these rows. If it served one row, each element would need 4 * rank bytes of R from the first-level
// cache, beside 4 bytes of bf16 theta from memory.

// R consecutive values of a factor: one, or four at an aligned address.
template <int R>
ZK_DEVICE void load_factor(const float* p, float x[R]) {
  if constexpr (R == 4) {
    const Vec16 v = *reinterpret_cast<const Vec16*>(p);
    ZK_UNROLL
    for (int r = 0; r < R; ++r) x[r] = from_bits(v.w[r]);
  } else {
    x[0] = *p;
  }
}

// acc + sum_k c_k L_k R_k^T for N rows from `row` on and eight columns from `column` on. The rank goes in
// steps of R.
template <int N, int R>
ZK_DEVICE void add_products(const LowRankEntry& t, int count, int64_t row, int64_t column,
                            float acc[N][kVector]) {
  ZK_NO_UNROLL
  for (int k = 0; k < count; ++k) {
    const float* left = t.left + (k * t.rows + row) * t.rank;
    const float* right = t.right + (k * t.columns + column) * t.rank;
    float product[N][kVector] = {};
    ZK_NO_UNROLL
    for (int at = 0; at < t.rank; at += R) {
      float l[N][R], x[kVector][R];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) load_factor<R>(left + v * t.rank + at, l[v]);
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) load_factor<R>(right + e * t.rank + at, x[e]);
      ZK_UNROLL
      for (int r = 0; r < R; ++r) {
        ZK_UNROLL
        for (int v = 0; v < N; ++v) {
          ZK_UNROLL
          for (int e = 0; e < kVector; ++e) product[v][e] = fma(l[v][r], x[e][r], product[v][e]);
        }
      }
    }
    const float c = t.coeffs[k];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) acc[v][e] = fma(c, product[v][e], acc[v][e]);
    }
  }
}

// The same for the element at (row, column).
ZK_DEVICE float add_product(const LowRankEntry& t, int count, int64_t row, int64_t column, float acc) {
  for (int k = 0; k < count; ++k) {
    const float* left = t.left + (k * t.rows + row) * t.rank;
    const float* right = t.right + (k * t.columns + column) * t.rank;
    float product = 0.0f;
    for (int r = 0; r < t.rank; ++r) product = fma(left[r], right[r], product);
    acc = fma(t.coeffs[k], product, acc);
  }
  return acc;
}

template <DType D>
ZK_GLOBAL low_rank_kernel(ZK_GRID_CONSTANT LowRankLaunch p) {
  using S = Storage<D>;
  const int i = tensor_of(p.table, blockIdx.x);
  const LowRankEntry& t = p.table.tensor[i];
  const uint32_t chunk = blockIdx.x - p.table.first_chunk[i];
  const Stream stream = p.table.stream[i];
  const float decay = p.decay != nullptr ? *p.decay : 1.0f;  // a product with 1 changes no bit

  const auto load = [&](const auto& at, float acc[kVector]) {
    S::unpack(at.template load<D>(t.in), acc);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) acc[e] = mul(decay, acc[e]);
  };
  const auto store = [&](const auto& at, uint64_t block, const float acc[kVector]) {
    if (D != DType::f32 && p.rounding_seed != nullptr) {
      const Words<uint32_t> random = draw(philox_key(seed_at(p.rounding_seed, 0)), block, stream, kRounding);
      at.template store<D>(t.out, S::template pack<true>(acc, random));
    } else {
      at.template store<D>(t.out, S::template pack<false>(acc, {}));
    }
  };

  if (t.has_vectors) {
    const uint32_t across = static_cast<uint32_t>((t.columns + kChunkColumns - 1) / kChunkColumns);
    const int64_t column = chunk % across * kChunkColumns + threadIdx.x % 32 * kVector;
    const int64_t first = chunk / across * kChunkRows + threadIdx.x / 32 * kRowsOfWarp;
    if (column >= t.columns) return;
    const bool by_four = (t.rank % 4 | (address(t.left) | address(t.right)) % 16) == 0;
    const auto rows = [&]<int N>(int64_t row) {
      const auto at = [&](int v) { return VectorAccess{(row + v) * t.columns + column, 0}; };
      float acc[N][kVector];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) load(at(v), acc[v]);
      if (by_four) {
        add_products<N, 4>(t, p.count, row, column, acc);
      } else {
        add_products<N, 1>(t, p.count, row, column, acc);
      }
      ZK_UNROLL
      for (int v = 0; v < N; ++v) store(at(v), (t.offset + at(v).base) / kVector, acc[v]);
    };
    ZK_NO_UNROLL
    for (int64_t row = first; row < first + kRowsOfWarp && row < t.rows; row += kRowsAtOnce) {
      if (row + kRowsAtOnce <= t.rows) {
        rows.template operator()<kRowsAtOnce>(row);
      } else {
        ZK_NO_UNROLL
        for (int64_t r = row; r < t.rows; ++r) rows.template operator()<1>(r);
      }
    }
    return;
  }

  const int64_t numel = t.rows * t.columns;
  const Tile<kNormal> tile(t.offset, chunk, stream, 0);
  ZK_NO_UNROLL
  for (int step = 0; step < tile.kVecs; ++step) {
    const EdgeAccess at = tile.edge(step, numel);
    if (at.first + kVector <= 0 || at.first >= numel) continue;
    float acc[kVector];
    load(at, acc);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const int64_t index = at.first + e;
      if (at.inside(e)) acc[e] = add_product(t, p.count, index / t.columns, index % t.columns, acc[e]);
    }
    store(at, tile.template block<false>(step), acc);
  }
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

int launch_low_rank(const LowRankLaunch& p, uint32_t chunks, DType dtype, void* stream) {
  return with_dtype(dtype, [&]<DType D>() { return launch(low_rank_kernel<D>, chunks, stream, p); });
}

void low_rank_cuda(TensorList out, TensorList params, TensorList left, TensorList right, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("low_rank", terms);
  check_terms("low_rank", params, terms);
  check_beside("low_rank", out, params);
  check_factors(left, right, params, terms);
  const OnDevice on(params[0]);
  const DType dtype = dtype_of("low_rank", params[0]);
  LowRankLaunch shared{};
  shared.decay = pointer<float>(decay);
  shared.rounding_seed = pointer<int64_t>(rounding_seed);
  shared.count = static_cast<int32_t>(seeds.numel());

  std::vector<Packed<LowRankEntry>> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    LowRankEntry entry{};
    entry.in = params[i].const_data_ptr();
    entry.out = out[i].mutable_data_ptr();
    entry.left = pointer<float>(left[i]);
    entry.right = pointer<float>(right[i]);
    entry.coeffs = pointer<float>(coeffs) + i * terms.coeff_stride();
    entry.rows = left[i].size(1);
    entry.columns = right[i].size(1);
    entry.offset = static_cast<uint64_t>(offsets[i]);
    entry.rank = static_cast<int32_t>(left[i].size(2));
    entry.has_vectors = rows_are_vectors(entry);
    tensors.push_back(packed(entry, terms, i, low_rank_chunks(entry)));
  }
  pack_launches(shared, tensors, [&](const LowRankLaunch& launch, uint32_t chunks) {
    check_launch("low_rank", launch_low_rank(launch, chunks, dtype, on.stream));
  });
}

}  // namespace

ZK_REGISTER(low_rank,
            "low_rank(Tensor(a!)[] out, Tensor[] params, Tensor[] left, Tensor[] right, " ZK_TERMS_SCHEMA
            ") -> ()")

}  // namespace zk::cuda
