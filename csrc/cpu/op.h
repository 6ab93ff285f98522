// What the entries of all operations share: they unpack tensors (stable ABI only), spread elements over torch's thread pool
// and register themselves as torch.ops.zokernels_cpu.*. Arguments were checked in Python (zokernels/checks.py); the checks
// here guard memory against a direct call. Kernels do not include this file: it holds inline code of torch and of the
// standard library, which must be compiled without flags of an instruction set.
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

// Registers the function <op>_cpu under its schema. Python reads the schema to pass arguments
// (zokernels/backends/library.py).
#define ZK_REGISTER(op, schema)                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cpu, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cpu, CPU, m) { m.impl(#op, TORCH_BOX(&op##_cpu)); }
// The function <op>_planned_cpu, which takes a plan's table in the place of tensors.
#define ZK_REGISTER_PLANNED(op, schema)                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cpu, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cpu, CPU, m) { m.impl(#op "_planned", TORCH_BOX(&op##_planned_cpu)); }
// The same of a function without tensors, which has no dispatch key to go by.
#define ZK_REGISTER_CONSTANT(op, schema)                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cpu, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cpu, CompositeExplicitAutograd, m) { m.impl(#op, TORCH_BOX(&op##_cpu)); }

namespace zk::cpu {

using torch::stable::Tensor;

// At least this many elements a thread: about 30 us of work, ten times the cost of waking the pool.
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

// body(piece, scratch) over the elements of all spans, which lie in the thread pool's pieces end to end.
template <class Body>
void parallel(const std::vector<Span>& spans, int64_t scratch_size, const Body& body) {
  std::vector<int64_t> starts;  // elements before each span
  int64_t total = 0;
  for (const Span& span : spans) {
    starts.push_back(total);
    total += span.numel;
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<std::byte[]> memory(new std::byte[scratch_size + 64]);
    void* scratch = memory.get();
    size_t space = scratch_size + 64;
    std::align(64, scratch_size, scratch, space);
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      Span piece = spans[i];
      const int64_t stop = std::min(end, starts[i] + piece.numel);
      piece.begin = begin - starts[i];
      piece.end = stop - starts[i];
      body(piece, scratch);
      begin = stop;
    }
  });
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

inline void* ahead(void* p, int64_t bytes) { return p == nullptr ? nullptr : static_cast<std::byte*>(p) + bytes; }
inline const void* ahead(const void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const std::byte*>(p) + bytes;
}

// What an operation's kernel gets: its terms, a span for each tensor that has elements, and what both point into.
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

  // The spans; set(span, i) adds what the operation has of its own for tensor i. Keys and coefficients are complete.
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

  void add_spans(const Rows& rows) {
    terms.keys = keys.data();
    spans.reserve(rows.count);
    const int64_t stride = args.coeff_stride();
    for (const Row& row : rows) {
      if (row.numel == 0) continue;
      Span span{};
      span.in = row.in;
      span.out = row.out;
      for (int s = 0; s < 2; ++s) span.more[s] = row.more[s];
      span.coeffs = coeffs.data() + (&row - rows.begin()) * stride;
      span.mask = static_cast<const uint8_t*>(row.mask);
      span.curvature = row.curvature;
      span.numel = row.numel;
      span.offset = static_cast<uint64_t>(row.offset);
      span.stream = Stream(static_cast<uint64_t>(row.stream));
      span.width = row.width;
      span.length = row.length;
      if (row.width > 0) span.blocks = row_blocks(row.offset, row.width, row.length);
      spans.push_back(span);
    }
  }

  // scratch: bytes a direction; without it, what noise takes.
  template <class Op, class Kernel>
  void run(const Op& op, const Kernel& kernel) const {
    run(op, kernel, op.dist == kRademacher ? kScratchPerDirection : 0);
  }
  template <class Op, class Kernel>
  void run(const Op& op, const Kernel& kernel, int64_t scratch) const {
    parallel(spans, static_cast<int64_t>(keys.size()) * scratch, [&](const Span& piece, void* memory) {
      if (piece.width == 0) return kernel(op, piece, memory);
      for (int64_t row = piece.begin / piece.width; row * piece.width < piece.end; ++row) {
        kernel(op, row_of(piece, row), memory);
      }
    });
  }

  DType state[2]{};  // of Span::more in update

  // The part of a piece that lies in one row, as a piece of a tensor that is that row.
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

// For operations whose kernels know one piece only.
inline void check_one_piece(const char* op, const TermArgs& args) {
  STD_TORCH_CHECK(args.widths.empty(), op, ": widths: expected none");
}

inline void check_params(const char* op, const TensorList& written, const TensorList& params, const TermArgs& args,
                         bool quantized = false) {
  check_terms(op, params, args);
  check_beside(op, written, params);
  STD_TORCH_CHECK((dtype_of(params[0]) == DType::i8) == quantized, op, ": params: unexpected dtype");
}

}  // namespace zk::cpu
