// low_rank_linear: out_p += c_p ((x_p B_p) A_p^T + b_p) for the rows x_p of every member p of a population.
//
// Three launches, in which no thread waits for another: chains of the sums over the columns of x, eight to a
// thread; their sums; and then out. Between them lie (8 + 1) r floats for each row.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

// The chains of a sum, and the threads of a row that share them (docs/contract.md).
constexpr int kChains = 64, kParts = kChains / kVector;
// Numbers of the rank that a thread sums at once, and rows of out that it computes at once.
constexpr int kRanksAtOnce = 4, kOutRows = 4;

struct LinearEntry {
  int64_t first;  // row of the batch
  int32_t rows;
  int32_t member;
};

struct LinearLaunch {
  const void* x;       // [N, n]
  void* out;           // [N, m]
  const float* left;   // [groups, m, rank]
  const float* right;  // [groups, n, rank]
  float* partial;      // [N, rank, kParts]
  float* sums;         // [N, rank]
  int32_t m, n, rank;
  bool has_vectors;  // rows of x (or out) are whole vectors at aligned addresses
  int32_t members;   // of a group, which share a factor: right of the chains, left of out
  Table<LinearEntry, kMaxArgument - 128> table;
};
static_assert(sizeof(LinearLaunch) <= kMaxArgument);

// What only the last launch needs.
struct OutArguments {
  const float* coeffs;  // [members]
  const float* bias;    // [groups, m], or null
  int32_t members;      // that share a bias
  bool add;             // out is read
};

// --- the kernels -----------------------------------------------------------------------------------------

template <DType D>
ZK_DEVICE void load_vector(const void* row, int64_t column, int64_t columns, bool whole, float x[kVector]) {
  using S = Storage<D>;
  if (whole) {
    S::unpack(VectorAccess{column, 0}.template load<D>(row), x);
  } else {
    S::unpack(EdgeAccess{column, columns}.template load<D>(row), x);
  }
}

template <DType D>
ZK_DEVICE const void* row_at(const void* p, int64_t row, int64_t columns) {
  return static_cast<const typename Storage<D>::T*>(p) + row * columns;
}

// Thread `index` of a member: part of the chains, then number of the rank, then row.
template <DType D>
ZK_GLOBAL linear_chains_kernel(ZK_GRID_CONSTANT LinearLaunch p) {
  const int i = tensor_of(p.table, blockIdx.x);
  const LinearEntry& t = p.table.tensor[i];
  const int64_t index = int64_t{blockIdx.x - p.table.first_chunk[i]} * kThreads + threadIdx.x;
  const int groups = (p.rank + kRanksAtOnce - 1) / kRanksAtOnce;
  const int part = static_cast<int>(index % kParts), group = static_cast<int>(index / kParts % groups);
  const int64_t local = index / kParts / groups;
  if (local >= t.rows) return;
  const int64_t row = t.first + local;
  const void* x = row_at<D>(p.x, row, p.n);
  const float* right = p.right + t.member / p.members * int64_t{p.n} * p.rank;
  const int begin = group * kRanksAtOnce;
  float chain[kRanksAtOnce][kVector] = {};
  ZK_NO_UNROLL
  for (int64_t at = part * kVector; at < p.n; at += kChains) {
    float v[kVector];
    load_vector<D>(x, at, p.n, p.has_vectors, v);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (at + e >= p.n) continue;
      const float* b = right + (at + e) * p.rank + begin;
      ZK_UNROLL
      for (int j = 0; j < kRanksAtOnce; ++j) {
        if (begin + j < p.rank) chain[j][e] = fma(v[e], b[j], chain[j][e]);
      }
    }
  }
  ZK_UNROLL
  for (int j = 0; j < kRanksAtOnce; ++j) {
    if (begin + j >= p.rank) continue;
    const float* c = chain[j];
    const float sum = add(add(add(c[0], c[1]), add(c[2], c[3])), add(add(c[4], c[5]), add(c[6], c[7])));
    p.partial[(row * p.rank + begin + j) * kParts + part] = sum;
  }
}

// A thread for each row and number of the rank, of the whole batch.
ZK_GLOBAL linear_sums_kernel(const float* partial, float* sums, int64_t count) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= count) return;
  const float* c = partial + index * kParts;
  sums[index] = add(add(add(c[0], c[1]), add(c[2], c[3])), add(add(c[4], c[5]), add(c[6], c[7])));
}

// A thread has eight columns of kOutRows rows, so that what it reads of left serves all of them.
template <DType D>
ZK_GLOBAL linear_out_kernel(ZK_GRID_CONSTANT LinearLaunch p, OutArguments more) {
  using S = Storage<D>;
  const int i = tensor_of(p.table, blockIdx.x);
  const LinearEntry& t = p.table.tensor[i];
  const int64_t index = int64_t{blockIdx.x - p.table.first_chunk[i]} * kThreads + threadIdx.x;
  const int64_t vectors = (p.m + kVector - 1) / kVector;
  const int64_t column = index % vectors * kVector, local = index / vectors * kOutRows;
  if (local >= t.rows) return;
  const int rows = static_cast<int>(t.rows - local < kOutRows ? t.rows - local : kOutRows);
  const float* left = p.left + (t.member / p.members * int64_t{p.m} + column) * p.rank;
  const float* sums = p.sums + (t.first + local) * p.rank;
  float product[kOutRows][kVector] = {};
  ZK_NO_UNROLL
  for (int j = 0; j < p.rank; ++j) {
    float a[kVector];
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) a[e] = column + e < p.m ? left[e * p.rank + j] : 0.0f;
    ZK_UNROLL
    for (int v = 0; v < kOutRows; ++v) {
      const float sum = v < rows ? sums[v * p.rank + j] : 0.0f;
      ZK_UNROLL
      for (int e = 0; e < kVector; ++e) product[v][e] = fma(sum, a[e], product[v][e]);
    }
  }
  const float c = more.coeffs[t.member];
  const float* bias = more.bias == nullptr ? nullptr
                                           : more.bias + t.member / more.members * int64_t{p.m} + column;
  ZK_UNROLL
  for (int v = 0; v < kOutRows; ++v) {
    if (v >= rows) continue;
    void* out = const_cast<void*>(row_at<D>(p.out, t.first + local + v, p.m));
    float y[kVector] = {};
    if (more.add) load_vector<D>(out, column, p.m, p.has_vectors, y);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      float z = product[v][e];
      if (bias != nullptr && column + e < p.m) z = add(z, bias[e]);
      y[e] = fma(c, z, y[e]);
    }
    const typename S::Raw raw = S::template pack<false>(y, {});
    if (p.has_vectors) {
      VectorAccess{column, 0}.template store<D>(out, raw);
    } else {
      EdgeAccess{column, p.m}.template store<D>(out, raw);
    }
  }
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

bool has_vectors(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(1) % kVector == 0;
}

// An entry for each member that has rows; chunks(rows) of each.
template <class Chunks>
std::vector<Packed<LinearEntry>> entries_of(const std::vector<int64_t>& rows, const Chunks& chunks) {
  std::vector<Packed<LinearEntry>> found;
  int64_t first = 0;
  for (size_t member = 0; member < rows.size(); ++member) {
    const LinearEntry entry{first, static_cast<int32_t>(rows[member]), static_cast<int32_t>(member)};
    found.push_back({entry, Stream(0), (chunks(rows[member]) + kThreads - 1) / kThreads});
    first += rows[member];
  }
  return found;
}

void low_rank_linear_cuda(Tensor out, Tensor x, Tensor left, Tensor right, Tensor coeffs,
                          std::vector<int64_t> rows, std::optional<Tensor> bias, bool add) {
  check_low_rank_linear(out, x, left, right, coeffs, rows, bias);
  if (out.numel() == 0) return;
  const OnDevice on(out);
  const DType dtype = dtype_of("low_rank_linear", out);
  const int64_t rank = left.size(2), total = out.size(0) * rank;
  Tensor partial = torch::stable::new_empty(left, {total, kParts + 1});
  auto* floats = static_cast<float*>(partial.mutable_data_ptr());
  LinearLaunch shared{};
  shared.x = x.const_data_ptr();
  shared.out = out.mutable_data_ptr();
  shared.left = pointer<float>(left);
  shared.right = pointer<float>(right);
  shared.partial = floats;
  shared.sums = floats + total * kParts;
  shared.m = static_cast<int32_t>(out.size(1));
  shared.n = static_cast<int32_t>(x.size(1));
  shared.rank = static_cast<int32_t>(rank);
  const auto sharing = [&](const Tensor& factor) {
    return static_cast<int32_t>(static_cast<int64_t>(rows.size()) / factor.size(0));
  };
  shared.has_vectors = has_vectors(x);
  shared.members = sharing(right);
  const int64_t groups = (rank + kRanksAtOnce - 1) / kRanksAtOnce;
  pack_launches(shared, entries_of(rows, [&](int64_t n) { return n * groups * kParts; }),
                [&](const LinearLaunch& p, uint32_t chunks) {
    check_launch("low_rank_linear", with_dtype(dtype, [&]<DType D>() {
      return launch(linear_chains_kernel<D>, chunks, on.stream, p);
    }));
  });
  check_launch("low_rank_linear",
               launch(linear_sums_kernel, static_cast<uint32_t>((total + kThreads - 1) / kThreads), on.stream,
                      floats, shared.sums, total));

  shared.has_vectors = has_vectors(out);
  shared.members = sharing(left);
  const OutArguments more{pointer<float>(coeffs), pointer<float>(bias), bias ? sharing(*bias) : 1, add};
  const int64_t vectors = (out.size(1) + kVector - 1) / kVector;
  pack_launches(shared, entries_of(rows, [&](int64_t n) { return (n + kOutRows - 1) / kOutRows * vectors; }),
                [&](const LinearLaunch& p, uint32_t chunks) {
    check_launch("low_rank_linear", with_dtype(dtype, [&]<DType D>() {
      return launch(linear_out_kernel<D>, chunks, on.stream, p, more);
    }));
  });
}

}  // namespace

ZK_REGISTER(low_rank_linear,
            "low_rank_linear(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor coeffs, "
            "int[] rows, Tensor? bias, bool add) -> ()")

}  // namespace zk::cuda
