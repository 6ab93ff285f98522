// What the entries of all operations share. An entry unpacks its tensors (by torch's stable ABI only),
// spreads the elements over torch's thread pool, and registers itself as torch.ops.zokernels_cpu.<op>. Python
// has checked the arguments (zokernels/checks.py); the checks here protect memory where someone calls the
// entry directly.
//
// Kernels do not include this file. It contains inline code of torch and of the standard library, which must
// be compiled without the flags of an instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../noise/rounding.h"
#include "../op_args.h"
#include "isa.h"

// The library's namespace in torch.ops. A build for the Hub has one of its own (packaging/hub.py).
#if !defined(ZK_NAMESPACE)
#define ZK_NAMESPACE zokernels_cpu
#endif

// Registers the function <op>_cpu under its schema. Python reads the schema to pass arguments
// (zokernels/backends/library.py).
#define ZK_REGISTER(op, schema)                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(ZK_NAMESPACE, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(ZK_NAMESPACE, CPU, m) { m.impl(#op, TORCH_BOX(&op##_cpu)); }
// Registers the function <op>_planned_cpu, which takes the table of a plan in place of tensors.
#define ZK_REGISTER_PLANNED(op, schema)                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(ZK_NAMESPACE, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(ZK_NAMESPACE, CPU, m) { m.impl(#op "_planned", TORCH_BOX(&op##_planned_cpu)); }
// The same for a function that takes no tensor: there is no tensor whose device could select the function.
#define ZK_REGISTER_CONSTANT(op, schema)                            \
  STABLE_TORCH_LIBRARY_FRAGMENT(ZK_NAMESPACE, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(ZK_NAMESPACE, CompositeExplicitAutograd, m) { m.impl(#op, TORCH_BOX(&op##_cpu)); }

namespace zk::cpu {

using torch::stable::Tensor;

// A thread gets at least this many elements: about 30 us of work, ten times what it costs to wake the pool.
constexpr int64_t kGrain = 32768;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    case torch::headeronly::ScalarType::Char: return DType::i8;
    default: STD_TORCH_CHECK(false, "zokernels_cpu: expected float32, bfloat16, float16 or int8 tensors");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline PhiloxKey key_of(const Tensor& seed) { return philox_key(data<uint64_t>(seed)[0]); }

inline std::vector<float> without_payloads(const Tensor& values) {
  std::vector<float> result(data<float>(values), data<float>(values) + values.numel());
  for (float& x : result) x = canonical_nan(x);
  return result;
}

// Calls body(piece, scratch) in torch's thread pool until all elements of all spans are done. The pool
// divides the spans as if they lay end to end, so a large tensor is shared among threads and a thread may
// take several small ones.
//
// spans: has size(), numel(i), and span(i), which makes a span where it is needed: hundreds of small ones
// take less time than to write all of them to memory first.
template <class Spans, class Body>
void parallel(const Spans& spans, int64_t scratch_size, const Body& body) {
  const int64_t count = spans.size();
  std::unique_ptr<int64_t[]> starts(new int64_t[count]);  // how many elements lie before each span
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    starts[i] = total;
    total += spans.numel(i);
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<std::byte[]> memory(new std::byte[scratch_size + 64]);
    void* scratch = memory.get();
    size_t space = scratch_size + 64;
    std::align(64, scratch_size, scratch, space);
    auto i = std::upper_bound(starts.get(), starts.get() + count, begin) - starts.get() - 1;
    for (; begin < end; ++i) {
      const int64_t numel = spans.numel(i), stop = std::min(end, starts[i] + numel);
      if (stop == begin) continue;  // an empty one
      Span piece = spans.span(i);
      piece.begin = begin - starts[i];
      piece.end = stop - starts[i];
      body(piece, scratch);
      begin = stop;
    }
  });
}

// Spans that are written down.
struct SpanList {
  const std::vector<Span>& list;
  int64_t size() const { return static_cast<int64_t>(list.size()); }
  int64_t numel(int64_t i) const { return list[i].numel; }
  const Span& span(int64_t i) const { return list[i]; }
};

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

inline void* ahead(void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<std::byte*>(p) + bytes;
}
inline const void* ahead(const void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const std::byte*>(p) + bytes;
}

// What the kernel of an operation gets: the terms, a span for each tensor that has elements, and the arrays
// that both point into.
struct Call {
  const TermArgs& args;
  std::vector<PhiloxKey> keys;
  std::vector<float> coeffs;
  Terms terms{};
  std::vector<Span> spans;

  Call(const TermArgs& args, const TensorList& params) : Call(args, dtype_of(params[0])) {
    if (!args.curvature.empty()) terms.curvature = dtype_of(args.curvature[0]);
  }

  Call(const TermArgs& args, const Rows& rows) : Call(args, static_cast<DType>(rows.first().dtype)) {
    if (rows.first().state[0] >= 0) terms.curvature = static_cast<DType>(rows.first().state[0]);
  }

  Call(const TermArgs& args, DType dtype) : args(args), coeffs(without_payloads(args.coeffs)) {
    const auto* seeds = data<uint64_t>(args.seeds);
    for (int64_t k = 0; k < args.seeds.numel(); ++k) keys.push_back(philox_key(seeds[k]));
    terms.count = args.seeds.numel();
    terms.dist = args.domain();
    terms.dtype = dtype;
    if (args.decay) terms.decay = canonical_nan(data<float>(*args.decay)[0]);
    terms.has_decay = args.decay && terms.decay != 1.0f;
    terms.stochastic = args.rounding_seed.has_value();
    if (terms.stochastic) terms.rounding = key_of(*args.rounding_seed);
    terms.has_mask_seed = args.mask_seed.has_value();
    if (terms.has_mask_seed) terms.mask = key_of(*args.mask_seed);
    terms.mask_keep = static_cast<uint32_t>(args.mask_keep);
  }

  // Adds the spans; set(span, i) fills in what only this operation has for tensor i. `keys` and `coeffs` must
  // be complete, since the spans point into them.
  template <class Set>
  void add_spans(const TensorList& params, const Set& set) {
    terms.keys = keys.data();
    for (size_t i = 0; i < params.size(); ++i) {
      Span span{};
      span.numel = params[i].numel();
      if (span.numel == 0) continue;
      span.in = params[i].const_data_ptr();
      span.offset = static_cast<uint64_t>(args.offsets[i]);
      span.stream = Stream(static_cast<uint64_t>(args.streams[i]));
      span.coeffs = coeffs.data() + i * args.coeff_stride();
      span.width = args.width(i);
      span.length = args.length(i);
      if (span.width > 0) span.blocks = args.row_blocks(i);
      if (!args.masks.empty()) span.mask = data<uint8_t>(args.masks[i]);
      if (!args.curvature.empty()) span.curvature = args.curvature[i].const_data_ptr();
      set(span, i);
      spans.push_back(span);
    }
  }

  // The spans of the rows of a plan's table (op_args.h).
  struct RowSpans {
    const Rows& rows;
    const Call& call;
    bool is_read_only;  // of fan_out: theta is not written
    int64_t stride;     // of the coefficients

    int64_t size() const { return rows.count; }
    int64_t numel(int64_t i) const { return rows.rows[i].numel; }
    Span span(int64_t i) const {
      const Row& row = rows.rows[i];
      Span span{};
      span.in = row.in;
      span.out = is_read_only ? nullptr : row.out;
      for (int s = 0; s < 2; ++s) span.more[s] = row.more[s];
      span.coeffs = call.coeffs.data() + i * stride;
      span.mask = static_cast<const uint8_t*>(row.mask);
      span.curvature = row.curvature;
      span.numel = row.numel;
      span.offset = static_cast<uint64_t>(row.offset);
      span.stream = Stream(static_cast<uint64_t>(row.stream));
      span.width = row.width;
      span.length = row.length;
      if (row.width > 0) span.blocks = row_blocks(row.offset, row.width, row.length);
      return span;
    }
  };

  // Runs the kernel over the spans that were added, or over the rows of a table; `keys` and `coeffs` must be
  // complete. `scratch` is in bytes for each direction; without it, as much as the noise needs.
  template <class Op, class Kernel>
  void run(const Op& op, const Kernel& kernel) const {
    run(op, kernel, scratch_for(op));
  }
  template <class Op, class Kernel>
  void run(const Op& op, const Kernel& kernel, int64_t scratch) const {
    run_over(SpanList{spans}, op, kernel, scratch);
  }
  template <class Op, class Kernel>
  void run(const Rows& rows, Op op, const Kernel& kernel, bool is_read_only = false) const {
    op.keys = keys.data();
    run_over(RowSpans{rows, *this, is_read_only, args.coeff_stride()}, op, kernel, scratch_for(op));
  }

  static int64_t scratch_for(const Terms& op) { return op.dist == kRademacher ? kScratchPerDirection : 0; }

  template <class Spans, class Op, class Kernel>
  void run_over(const Spans& over, const Op& op, const Kernel& kernel, int64_t scratch) const {
    parallel(over, static_cast<int64_t>(keys.size()) * scratch, [&](const Span& piece, void* memory) {
      if (piece.width == 0) return kernel(op, piece, memory);
      for (int64_t row = piece.begin / piece.width; row * piece.width < piece.end; ++row) {
        kernel(op, row_of(piece, row), memory);
      }
    });
  }

  DType state[2]{};  // of update: the dtypes of Span::more

  // The part of `piece` that lies in one row, as a piece of a tensor that consists of that row.
  Span row_of(const Span& piece, int64_t row) const {
    const int64_t first = row * piece.width, bytes = size_of(terms.dtype);
    Span part = piece;
    part.in = ahead(piece.in, first * bytes);
    part.out = ahead(piece.out, first * bytes);
    for (int s = 0; s < 2; ++s) part.more[s] = ahead(piece.more[s], first * size_of(state[s]));
    part.curvature = ahead(piece.curvature, first * size_of(terms.curvature));
    if (piece.mask != nullptr) part.mask = piece.mask + row * piece.blocks;
    part.numel = piece.width;
    part.offset = piece.offset + static_cast<uint64_t>(row * piece.length);
    part.begin = std::max<int64_t>(piece.begin - first, 0);
    part.end = std::min(piece.end - first, piece.width);
    return part;
  }
};

// For operations whose kernels take only tensors that lie in one piece.
inline void check_one_piece(const char* op, const TermArgs& args) {
  STD_TORCH_CHECK(args.widths.empty(), op, ": widths: expected none");
}

inline void check_params(const char* op, const TensorList& written, const TensorList& params,
                         const TermArgs& args, bool quantized = false) {
  check_terms(op, params, args);
  check_beside(op, written, params);
  STD_TORCH_CHECK((dtype_of(params[0]) == DType::i8) == quantized, op, ": params: unexpected dtype");
}

}  // namespace zk::cpu
