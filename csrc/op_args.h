// What the entries of the two tensor libraries share: the terms of an operation as arguments, and the checks
// that keep a direct call in bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "noise/philox.h"
#include "noise/rules.h"
#include "noise/wire.h"

// The terms of an operation (zokernels/backends/terms.py) in a schema, as parameters of its entry, and
// packed. low_rank has neither masks nor curvature, and of its seeds only the number counts.
#define ZK_TERMS_SCHEMA                                                                                         \
  "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, int dist, Tensor? decay, Tensor? rounding_seed, " \
  "Tensor[] masks, Tensor? mask_seed, int mask_keep, Tensor[] curvature, int[] widths, int[] lengths"
#define ZK_TERMS_PARAMS                                                                             \
  torch::stable::Tensor seeds, torch::stable::Tensor coeffs, std::vector<int64_t> streams,          \
      std::vector<int64_t> offsets, int64_t dist, std::optional<torch::stable::Tensor> decay,       \
      std::optional<torch::stable::Tensor> rounding_seed, std::vector<torch::stable::Tensor> masks, \
      std::optional<torch::stable::Tensor> mask_seed, int64_t mask_keep,                            \
      std::vector<torch::stable::Tensor> curvature, std::vector<int64_t> widths,                    \
      std::vector<int64_t> lengths
#define ZK_TERMS                                                                                         \
  zk::TermArgs {                                                                                         \
    seeds, coeffs, streams, offsets, dist, decay, rounding_seed, masks, mask_seed, mask_keep, curvature, \
        widths, lengths                                                                                  \
  }

// The same where a plan keeps what depends on the tensors alone (zokernels/ops/plan.py): its table, and the
// terms that each call brings.
#define ZK_PLANNED_SCHEMA \
  "Tensor seeds, Tensor coeffs, int dist, Tensor? decay, Tensor? rounding_seed, Tensor? mask_seed, int mask_keep"
#define ZK_PLANNED_PARAMS                                                                             \
  torch::stable::Tensor seeds, torch::stable::Tensor coeffs, int64_t dist,                            \
      std::optional<torch::stable::Tensor> decay, std::optional<torch::stable::Tensor> rounding_seed, \
      std::optional<torch::stable::Tensor> mask_seed, int64_t mask_keep
#define ZK_PLANNED_TERMS                                                                                  \
  zk::TermArgs {                                                                                          \
    seeds, coeffs, zk::kNoNumbers, zk::kNoNumbers, dist, decay, rounding_seed, zk::kNoTensors, mask_seed, \
        mask_keep, zk::kNoTensors, zk::kNoNumbers, zk::kNoNumbers                                         \
  }

namespace zk {

using TensorList = std::vector<torch::stable::Tensor>;

inline const std::vector<int64_t> kNoNumbers;
inline const TensorList kNoTensors;

// How many blocks of eight a mask has for each row of a tensor of rows: as many as the row that touches most.
inline int64_t row_blocks(int64_t offset, int64_t width, int64_t length) {
  return (offset | width | length) % 8 == 0 ? width / 8 : (width + 14) / 8;
}

struct TermArgs {
  const torch::stable::Tensor &seeds, &coeffs;
  const std::vector<int64_t>&streams, &offsets;
  int64_t dist;
  const std::optional<torch::stable::Tensor>&decay, &rounding_seed;
  const std::vector<torch::stable::Tensor>& masks;
  const std::optional<torch::stable::Tensor>& mask_seed;
  int64_t mask_keep;
  const std::vector<torch::stable::Tensor>& curvature;
  const std::vector<int64_t>&widths, &lengths;  // empty: every tensor lies in one piece

  // Elements of a row of tensor i, and logical indices from row to row; 0: it lies in one piece.
  int64_t width(size_t i) const { return widths.empty() ? 0 : widths[i]; }
  int64_t length(size_t i) const { return widths.empty() ? 0 : lengths[i]; }
  bool in_rows(size_t i) const { return width(i) > 0; }
  int64_t row_blocks(size_t i) const { return zk::row_blocks(offsets[i], width(i), length(i)); }
  // How many elements after a tensor's coefficients those of the next tensor begin.
  int64_t coeff_stride() const { return coeffs.dim() == 2 ? seeds.numel() : 0; }
  // Whether there is one coefficient for each direction, no mask and no curvature.
  bool is_plain() const { return coeffs.dim() == 1 && masks.empty() && !mask_seed && curvature.empty(); }
  Domain domain() const { return static_cast<Domain>(dist); }
};

// One tensor of a call as plain data: what is left of it when it has been checked. A plan's table is an array
// of these.
struct Row {
  const void* in;
  void* out;
  void* more[2];  // fan_out: plus, minus; update: the states
  const void* mask;
  const void* curvature;
  int64_t numel, offset, stream;
  int64_t width, length;  // of rows; 0: it lies in one piece
  int64_t dtype;          // of the parameters: 0 fp32, 1 bf16, 2 fp16
  int64_t state[2];       // dtypes of the states, or of the curvature in state[0]; -1: none
};

// The tensors of a call. A plan's table is int64 [tensors, sizeof(Row) / 8] on the CPU; Python made it of
// checked tensors, and here its shape is checked.
struct Rows {
  const Row* rows;
  int64_t count;

  explicit Rows(const std::vector<Row>& made) : rows(made.data()), count(static_cast<int64_t>(made.size())) {}
  Rows(const char* op, const torch::stable::Tensor& table) {
    STD_TORCH_CHECK(table.scalar_type() == torch::headeronly::ScalarType::Long && table.is_contiguous() &&
                        table.get_device_index() == -1 && table.dim() == 2 && table.size(0) > 0 &&
                        table.size(1) == static_cast<int64_t>(sizeof(Row) / sizeof(int64_t)),
                    op, ": table: expected a plan's");
    rows = static_cast<const Row*>(table.const_data_ptr());
    count = table.size(0);
  }
  const Row* begin() const { return rows; }
  const Row* end() const { return rows + count; }
  const Row& first() const { return rows[0]; }
  bool are_masked() const {  // all or none, but an empty one's address may be null
    return std::any_of(begin(), end(), [](const Row& row) { return row.mask != nullptr; });
  }
  bool have_width() const {
    return std::any_of(begin(), end(), [](const Row& row) { return row.width > 0; });
  }
};

// The same of tensors that are checked; more: the lists of Row::more, of which some may be empty.
inline std::vector<Row> rows_of(const TensorList& out, const TensorList& params,
                                std::initializer_list<const TensorList*> more, const TermArgs& terms,
                                int64_t dtype) {
  std::vector<Row> rows(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    Row& row = rows[i];
    row.in = params[i].const_data_ptr();
    row.out = out[i].mutable_data_ptr();
    size_t count = 0;
    for (const TensorList* list : more)
      row.more[count++] = list->empty() ? nullptr : (*list)[i].mutable_data_ptr();
    if (!terms.masks.empty()) row.mask = terms.masks[i].const_data_ptr();
    if (!terms.curvature.empty()) row.curvature = terms.curvature[i].const_data_ptr();
    row.numel = params[i].numel();
    row.offset = terms.offsets[i];
    row.stream = terms.streams[i];
    row.width = terms.width(i);
    row.length = terms.length(i);
    row.dtype = dtype;
    row.state[0] = row.state[1] = -1;
  }
  return rows;
}

// The checks of a direct call's scalars. That the addresses of the tensors are right is up to the plan.
inline void check_planned(const char* op, const Rows& rows, const TermArgs& terms) {
  STD_TORCH_CHECK(terms.coeffs.numel() == (terms.coeffs.dim() == 2 ? rows.count : 1) * terms.seeds.numel(),
                  op, ": coeffs: expected one for each seed, or one for each tensor and seed");
  STD_TORCH_CHECK(terms.dist == 1 || terms.dist == 2, op,
                  ": dist: expected 1 (normal) or 2 (rademacher), got ", terms.dist);
}

// Tensors of one call lie on one device; the index of the CPU is -1.
inline void check_device(const char* op, const torch::stable::Tensor& t, const torch::stable::Tensor& first) {
  STD_TORCH_CHECK(t.get_device_index() == first.get_device_index(), op,
                  ": expected all tensors on one device");
}

inline void check_device(const char* op, const std::optional<torch::stable::Tensor>& t,
                         const torch::stable::Tensor& first) {
  if (t) check_device(op, *t, first);
}

// Tensors that go with params element by element: of one dtype, params' own or (another == true) a state's.
inline void check_beside(const char* op, const TensorList& tensors, const TensorList& params,
                         bool another = false) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensors.size() == params.size(), op, ": expected as many tensors beside params as params");
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType dtype = tensors[i].scalar_type();
    const bool right = another ? dtype == ScalarType::Float || dtype == ScalarType::BFloat16
                               : dtype == params[0].scalar_type();
    STD_TORCH_CHECK(right && dtype == tensors[0].scalar_type() && tensors[i].is_contiguous() &&
                        tensors[i].numel() == params[i].numel(),
                    op, ": expected contiguous tensors like params; not so at ", i);
    check_device(op, tensors[i], params[0]);
  }
}

inline void check_dist(const char* op, int64_t dist) {
  STD_TORCH_CHECK(dist == 1 || dist == 2, op, ": dist: expected 1 (normal) or 2 (rademacher), got ", dist);
}

inline void check_terms(const char* op, const TensorList& params, const TermArgs& terms) {
  const size_t n = params.size();
  STD_TORCH_CHECK(terms.streams.size() == n && terms.offsets.size() == n, op,
                  ": params, streams, offsets: expected equal lengths");
  STD_TORCH_CHECK(terms.coeffs.numel() ==
                      (terms.coeffs.dim() == 2 ? static_cast<int64_t>(n) : 1) * terms.seeds.numel(),
                  op, ": coeffs: expected one for each seed, or one for each tensor and seed");
  check_dist(op, terms.dist);
  check_beside(op, params, params);
  if (n > 0) {
    for (const auto* t : {&terms.seeds, &terms.coeffs}) check_device(op, *t, params[0]);
    for (const auto* t : {&terms.decay, &terms.rounding_seed, &terms.mask_seed})
      check_device(op, *t, params[0]);
  }
  STD_TORCH_CHECK(terms.widths.size() == terms.lengths.size() &&
                      (terms.widths.empty() || terms.widths.size() == n),
                  op, ": widths, lengths: expected one for each of params, or none");
  for (size_t i = 0; i < terms.widths.size(); ++i) {
    const int64_t width = terms.widths[i];
    STD_TORCH_CHECK(width == 0 || (width > 0 && width <= terms.lengths[i] && params[i].numel() % width == 0),
                    op, ": widths, lengths: expected rows that make up the tensor; not so at ", i);
  }
  STD_TORCH_CHECK(terms.masks.empty() || terms.masks.size() == n, op,
                  ": masks: expected one for each of params");
  for (size_t i = 0; i < terms.masks.size(); ++i) {
    const int64_t numel = params[i].numel(), width = terms.width(i);
    const int64_t bytes = width > 0 ? numel / width * terms.row_blocks(i)
                                    : (terms.offsets[i] % 8 + numel + 7) / 8;
    STD_TORCH_CHECK(terms.masks[i].is_contiguous() && (numel == 0 || terms.masks[i].numel() == bytes), op,
                    ": masks: expected a byte for each block of eight; not so at ", i);
    check_device(op, terms.masks[i], params[0]);
  }
  if (!terms.curvature.empty()) check_beside(op, terms.curvature, params, true);
}

// How many tiles of 4096 logical indices, which are summed in one order, a tensor touches.
inline int64_t sum_tiles(uint64_t offset, int64_t numel) {
  return numel == 0 ? 0 : (static_cast<int64_t>(offset % 4096) + numel + 4095) / 4096;
}

// columns: how many a tile has in partial.
inline void check_project(const torch::stable::Tensor& partial, int64_t columns, const TensorList& tensors,
                          const torch::stable::Tensor& seeds, const std::vector<int64_t>& streams,
                          const std::vector<int64_t>& offsets, int64_t dist) {
  STD_TORCH_CHECK(streams.size() == tensors.size() && offsets.size() == tensors.size(),
                  "project: tensors, streams, offsets: expected equal lengths");
  check_dist("project", dist);
  if (!tensors.empty()) check_beside("project", tensors, tensors);
  for (const auto& t : tensors) check_device("project", t, seeds);
  check_device("project", partial, seeds);
  int64_t tiles = 0;
  for (size_t i = 0; i < tensors.size(); ++i)
    tiles += sum_tiles(static_cast<uint64_t>(offsets[i]), tensors[i].numel());
  STD_TORCH_CHECK(partial.scalar_type() == torch::headeronly::ScalarType::Double && partial.is_contiguous() &&
                      partial.dim() == 2 && partial.size(0) == seeds.numel() &&
                      partial.size(1) == tiles * columns,
                  "project: partial: expected contiguous float64 [seeds, ", tiles * columns, "]");
}

inline void check_one_direction(const torch::stable::Tensor& seed, const torch::stable::Tensor& coeff,
                                const torch::stable::Tensor& first) {
  STD_TORCH_CHECK(seed.numel() == 1 && coeff.numel() == 1, "fan_out: seed, coeff: expected one value each");
  for (const auto* t : {&seed, &coeff}) check_device("fan_out", *t, first);
}

inline void check_spread(const torch::stable::Tensor& out, const torch::stable::Tensor& x,
                         const TermArgs& terms) {
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == x.scalar_type() &&
                      out.numel() == terms.seeds.numel() * x.numel(),
                  "spread: out: expected a contiguous tensor like x for each seed");
  check_device("spread", out, x);
}

// A wire format by its number (zokernels/wire.py: its place in FORMATS) as a backend's DType.
template <class DType>
DType wire_of(int64_t wire) {
  STD_TORCH_CHECK(0 <= wire && wire < 4, "wire: expected a number below 4, got ", wire);
  constexpr DType of[] = {DType::bf16, DType::f16, DType::e4m3, DType::i8};
  return of[wire];
}

// Checks that there is a buffer of the right size for each tensor.
inline void check_wires(const char* op, const TensorList& wires, int64_t wire, const TensorList& params,
                        const std::vector<int64_t>& offsets) {
  STD_TORCH_CHECK(wires.size() == params.size() && offsets.size() == params.size(), op,
                  ": wires, offsets: expected one for each tensor");
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    int64_t bytes = 2 * numel;
    if (wire > 1) {
      bytes = numel == 0 ? 0
                         : wire_scale_begin(numel) + wire_blocks(numel, static_cast<uint64_t>(offsets[i]));
    }
    STD_TORCH_CHECK(wires[i].scalar_type() == torch::headeronly::ScalarType::Byte &&
                        wires[i].is_contiguous() && wires[i].numel() == bytes,
                    op, ": wires: expected contiguous uint8 [", bytes, "]; not so at ", i);
    check_device(op, wires[i], params[i]);
  }
}

inline Rule rule_of(const std::string& name) {
#define ZK_RULE_NAME(rule) \
  if (name == #rule) return Rule::rule;
  ZK_RULES(ZK_RULE_NAME)
#undef ZK_RULE_NAME
  STD_TORCH_CHECK(false, "update: rule: unknown: ", name);
}

// Checks the hyper values of a rule, and returns how many states it has.
inline int check_hyper(Rule rule, const torch::stable::Tensor& hyper, const TermArgs& terms) {
  int states = 0;
  int64_t values = 0;
#define ZK_RULE_SIZES(name)                                                                 \
  if (rule == Rule::name) {                                                                 \
    states = rules::name::states;                                                           \
    values = rules::name::values + (rules::name::value_per_seed ? terms.seeds.numel() : 0); \
  }
  ZK_RULES(ZK_RULE_SIZES)
#undef ZK_RULE_SIZES
  STD_TORCH_CHECK(hyper.numel() == values, "update: hyper: expected ", values, " values");
  STD_TORCH_CHECK(rule != Rule::hizoo || terms.seeds.numel() == 1, "update: seeds: expected one for hizoo");
  return states;
}

// The states of a rule: first and second as far as it has them.
inline void check_update(const TensorList& first, const TensorList& second, Rule rule,
                         const torch::stable::Tensor& hyper, const TensorList& params,
                         const TermArgs& terms) {
  const int states = check_hyper(rule, hyper, terms);
  if (states > 0) check_beside("update", first, params, true);
  if (states > 1) check_beside("update", second, params, true);
  check_device("update", hyper, params[0]);
}

// left [K, m, r] and right [K, n, r] for params of m n elements.
inline void check_factors(const TensorList& left, const TensorList& right, const TensorList& params,
                          const TermArgs& terms) {
  STD_TORCH_CHECK(left.size() == params.size() && right.size() == params.size(),
                  "low_rank: left, right: expected one for each of params");
  for (size_t i = 0; i < params.size(); ++i) {
    bool right_shape = true;
    for (const auto* factor : {&left[i], &right[i]}) {
      right_shape = right_shape && factor->dim() == 3 && factor->is_contiguous() &&
                    factor->scalar_type() == torch::headeronly::ScalarType::Float &&
                    factor->size(0) == terms.seeds.numel() && factor->size(2) == left[i].size(2);
      check_device("low_rank", *factor, params[i]);
    }
    STD_TORCH_CHECK(right_shape && left[i].size(1) * right[i].size(1) == params[i].numel(),
                    "low_rank: left, right: expected fp32 [K, m, r] and [K, n, r]; not so at ", i);
  }
}

// out [N, m] += c_p ((x [N, n] B_p) A_p^T + b_p) with left [P or 1, m, r], right [P or 1, n, r], coeffs [P],
// bias [P or 1, m] and the rows of each member, whose sum is N.
inline void check_low_rank_linear(const torch::stable::Tensor& out, const torch::stable::Tensor& x,
                                  const torch::stable::Tensor& left, const torch::stable::Tensor& right,
                                  const torch::stable::Tensor& coeffs, const std::vector<int64_t>& rows,
                                  const std::optional<torch::stable::Tensor>& bias) {
  const char* op = "low_rank_linear";
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(out.dim() == 2 && x.dim() == 2 && out.is_contiguous() && x.is_contiguous() &&
                      x.scalar_type() == out.scalar_type() && x.size(0) == out.size(0),
                  op, ": out, x: expected contiguous matrices of one dtype and as many rows");
  const int64_t members = static_cast<int64_t>(rows.size());
  const auto is_factor = [&](const torch::stable::Tensor& t, int64_t dims, int64_t columns) {
    check_device(op, t, out);
    return t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == dims && t.size(0) > 0 &&
           members % t.size(0) == 0 && t.size(1) == columns;
  };
  STD_TORCH_CHECK(is_factor(left, 3, out.size(1)) && is_factor(right, 3, x.size(1)) &&
                      left.size(2) == right.size(2) && left.size(2) >= 1 && left.size(2) <= 64 &&
                      (!bias || is_factor(*bias, 2, out.size(1))),
                  op,
                  ": left, right, bias: expected fp32 [G, m, r], [G, n, r], [G, m] with G a divisor of P");
  int64_t total = 0;
  for (const int64_t count : rows) {
    STD_TORCH_CHECK(count >= 0 && count <= out.size(0), op, ": rows: expected numbers of rows");
    total += count;
  }
  STD_TORCH_CHECK(total == out.size(0) && coeffs.numel() == members &&
                      coeffs.scalar_type() == ScalarType::Float && coeffs.is_contiguous(),
                  op, ": rows, coeffs: expected one for each member, and as many rows as out has");
  check_device(op, x, out);
  check_device(op, coeffs, out);
}

// y [N, out] = x W^T + b with x [N, in], weight int8 [out, in] or uint8 [out, (in + 1) / 2], scale [out,
// groups] and bias [out].
inline void check_quantized_linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                   const torch::stable::Tensor& scale,
                                   const std::optional<torch::stable::Tensor>& bias, int64_t x_bits) {
  const char* op = "quantized_linear";
  using torch::headeronly::ScalarType;
  const auto is_float = [](const torch::stable::Tensor& t) {
    return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16 ||
           t.scalar_type() == ScalarType::Half;
  };
  const auto is_matrix = [](const torch::stable::Tensor& t) { return t.dim() == 2 && t.is_contiguous(); };
  STD_TORCH_CHECK(is_matrix(x) && is_matrix(weight) && is_matrix(scale) && is_float(x) && is_float(scale), op,
                  ": x, weight, scale: expected contiguous matrices, x and scale of floats");
  const bool packed = weight.scalar_type() == ScalarType::Byte;
  const int64_t columns = x.size(1), groups = scale.size(1);
  STD_TORCH_CHECK((packed || weight.scalar_type() == ScalarType::Char) && weight.size(0) == scale.size(0) &&
                      weight.size(1) == (packed ? (columns + 1) / 2 : columns),
                  op, ": weight: expected int8 [out, in] or uint8 [out, (in + 1) / 2]");
  STD_TORCH_CHECK(columns == 0 || (groups > 0 && columns % groups == 0 && columns / groups < 131072), op,
                  ": scale: expected [out, groups], groups of at most 131,071 of the columns of x");
  STD_TORCH_CHECK(!bias || (is_float(*bias) && bias->is_contiguous() && bias->dim() == 1 &&
                            bias->size(0) == scale.size(0)),
                  op, ": bias: expected floats [out]");
  STD_TORCH_CHECK(x_bits == 24 || x_bits == 8, op, ": x_bits: expected 24 or 8, got ", x_bits);
  for (const auto* t : {&weight, &scale}) check_device(op, *t, x);
  check_device(op, bias, x);
}

}  // namespace zk
