// torch.ops.zokernels_cpu.*: unpacks tensors (stable ABI only) and spreads elements over torch's thread pool.
// Arguments were checked in zokernels/checks.py; the checks here guard memory against a direct call.
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

namespace zk::cpu {
namespace {

using torch::stable::Tensor;

// At least this many elements a thread: about 30 us of work, ten times the cost of waking the pool.
constexpr int64_t kGrain = 32768;

DType dtype_of(const Tensor& t) {
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

PhiloxKey key_of(const Tensor& seed) { return philox_key(data<uint64_t>(seed)[0]); }

std::vector<float> without_payloads(const Tensor& values) {
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

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

void* ahead(void* p, int64_t bytes) { return p == nullptr ? nullptr : static_cast<std::byte*>(p) + bytes; }
const void* ahead(const void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const std::byte*>(p) + bytes;
}

// What an operation's kernel gets: its terms, a span for each tensor that has elements, and what both point into.
struct Call {
  const TermArgs& args;
  std::vector<PhiloxKey> keys;
  std::vector<float> coeffs;
  Terms terms{};
  std::vector<Span> spans;

  Call(const TermArgs& args, const TensorList& params) : args(args), coeffs(without_payloads(args.coeffs)) {
    const auto* seeds = data<uint64_t>(args.seeds);
    for (int64_t k = 0; k < args.seeds.numel(); ++k) keys.push_back(philox_key(seeds[k]));
    terms.count = args.seeds.numel();
    terms.dist = args.domain();
    terms.dtype = dtype_of(params[0]);
    if (args.decay) terms.decay = canonical_nan(data<float>(*args.decay)[0]);
    terms.has_decay = args.decay && terms.decay != 1.0f;
    terms.stochastic = args.rounding_seed.has_value();
    if (terms.stochastic) terms.rounding = key_of(*args.rounding_seed);
    terms.has_mask_seed = args.mask_seed.has_value();
    if (terms.has_mask_seed) terms.mask = key_of(*args.mask_seed);
    terms.mask_keep = static_cast<uint32_t>(args.mask_keep);
    if (!args.curvature.empty()) terms.curvature = dtype_of(args.curvature[0]);
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

void combine_by(const TensorList& out, const TensorList& params, const TermArgs& args, float low, float high,
                const std::string& isa) {
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t i) { span.out = out[i].mutable_data_ptr(); });
  call.run(Combine{{call.terms}, Form::one, low, high, false, {}}, kernels_of(isa).combine);
}

// For operations whose kernels know one piece only.
void check_one_piece(const char* op, const TermArgs& args) {
  STD_TORCH_CHECK(args.widths.empty(), op, ": widths: expected none");
}

void check_params(const char* op, const TensorList& written, const TensorList& params, const TermArgs& args,
                  bool quantized = false) {
  check_terms(op, params, args);
  check_beside(op, written, params);
  STD_TORCH_CHECK((dtype_of(params[0]) == DType::i8) == quantized, op, ": params: unexpected dtype");
}

void combine_cpu(TensorList out, TensorList params, ZK_TERMS_PARAMS, std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_params("combine", out, params, args);
  combine_by(out, params, args, 0.0f, 0.0f, isa);
}

void requantize_cpu(TensorList out, TensorList params, int64_t low, int64_t high, ZK_TERMS_PARAMS, std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("requantize", args);
  check_params("requantize", out, params, args, true);
  combine_by(out, params, args, static_cast<float>(low), static_cast<float>(high), isa);
}

void fan_out_cpu(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff, ZK_TERMS_PARAMS,
                 std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("fan_out", args);
  check_params("fan_out", plus, params, args);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff, params[0]);
  Call call(args, params);
  call.keys.push_back(key_of(seed));
  call.coeffs.push_back(canonical_nan(data<float>(coeff)[0]));
  const bool writes = args.seeds.numel() > 0 || decay.has_value();
  call.add_spans(params, [&](Span& span, size_t i) {
    span.out = writes ? params[i].mutable_data_ptr() : nullptr;
    span.more[0] = plus[i].mutable_data_ptr();
    span.more[1] = minus[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::fan_out, 0.0f, 0.0f, false, {}}, kernels_of(isa).combine);
}

void spread_cpu(Tensor out, Tensor x, ZK_TERMS_PARAMS, std::string isa) {
  const TensorList params = {x};
  const TermArgs args = ZK_TERMS;
  check_one_piece("spread", args);
  check_params("spread", params, params, args);
  check_spread(out, x, args);
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t) { span.out = out.mutable_data_ptr(); });
  call.run(Combine{{call.terms}, Form::spread, 0.0f, 0.0f, false, {}}, kernels_of(isa).combine);
}

void update_cpu(TensorList params, TensorList first, TensorList second, std::string rule, Tensor hyper, ZK_TERMS_PARAMS,
                std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_params("update", params, params, args);
  check_update(first, second, rule_of(rule), hyper, params, args);
  Call call(args, params);
  const TensorList* states[2] = {&first, &second};
  call.add_spans(params, [&](Span& span, size_t i) {
    span.out = params[i].mutable_data_ptr();
    for (int s = 0; s < 2; ++s) span.more[s] = states[s]->empty() ? nullptr : (*states[s])[i].mutable_data_ptr();
  });
  const std::vector<float> values = without_payloads(hyper);
  Update op{{call.terms}, rule_of(rule), values.data(), {}};
  for (int s = 0; s < 2; ++s) {
    if (!states[s]->empty()) op.state[s] = call.state[s] = dtype_of(states[s]->front());
  }
  call.run(op, kernels_of(isa).update);
}

// right [K, n, r] as Span::right.
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
  std::vector<std::unique_ptr<float[]>> panels;
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
  call.run(Combine{{call.terms}, Form::one, 0.0f, 0.0f, false, {}}, kernels_of(isa).low_rank,
           kProducts * sizeof(float));
}

void decode_cpu(TensorList out, TensorList wires, int64_t wire, ZK_TERMS_PARAMS, std::string isa) {
  if (out.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("decode", args);
  check_params("decode", out, out, args);
  check_wires("decode", wires, wire, out, offsets);
  Call call(args, out);
  call.add_spans(out, [&](Span& span, size_t i) {
    span.in = wires[i].const_data_ptr();
    span.out = out[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::one, 0.0f, 0.0f, true, wire_of<DType>(wire)}, kernels_of(isa).combine);
}

void decode_fan_out_cpu(TensorList plus, TensorList minus, TensorList wires, int64_t wire, Tensor seed, Tensor coeff,
                        ZK_TERMS_PARAMS, std::string isa) {
  if (plus.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("decode_fan_out", args);
  check_params("decode_fan_out", minus, plus, args);
  check_wires("decode_fan_out", wires, wire, plus, offsets);
  check_one_direction(seed, coeff, plus[0]);
  Call call(args, plus);
  call.keys.push_back(key_of(seed));
  call.coeffs.push_back(canonical_nan(data<float>(coeff)[0]));
  call.add_spans(plus, [&](Span& span, size_t i) {
    span.in = wires[i].const_data_ptr();
    span.more[0] = plus[i].mutable_data_ptr();
    span.more[1] = minus[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::fan_out, 0.0f, 0.0f, true, wire_of<DType>(wire)}, kernels_of(isa).combine);
}

void encode_cpu(TensorList out, TensorList params, int64_t wire, std::vector<int64_t> offsets, std::string isa) {
  if (params.empty()) return;
  check_beside("encode", params, params);
  check_wires("encode", out, wire, params, offsets);
  std::vector<Encode> ops;
  std::vector<int64_t> starts;  // blocks before each tensor
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    if (numel == 0) continue;
    const auto offset = static_cast<uint64_t>(offsets[i]);
    ops.push_back({params[i].const_data_ptr(), static_cast<uint8_t*>(out[i].mutable_data_ptr()), numel, offset,
                   dtype_of(params[i]), wire_of<DType>(wire)});
    starts.push_back(total);
    total += wire_blocks(numel, offset);
  }
  const auto kernel = kernels_of(isa).encode;
  torch::stable::parallel_for(0, total, kGrain / kWireBlock, [&](int64_t begin, int64_t end) {
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = i + 1 < static_cast<int64_t>(starts.size()) ? std::min(end, starts[i + 1]) : end;
      kernel(ops[i], begin - starts[i], stop - starts[i]);
      begin = stop;
    }
  });
}

Tensor squares_cpu(Tensor seeds, std::vector<int64_t> sizes, std::vector<int64_t> streams, std::vector<int64_t> offsets,
                   int64_t dist, std::string isa) {
  STD_TORCH_CHECK(streams.size() == sizes.size() && offsets.size() == sizes.size(),
                  "squares: sizes, streams, offsets: expected equal lengths");
  check_dist("squares", dist);
  const int64_t count = seeds.numel();
  std::vector<PhiloxKey> keys;
  for (int64_t k = 0; k < count; ++k) keys.push_back(philox_key(data<uint64_t>(seeds)[k]));
  std::vector<Span> spans;
  int64_t total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    total += sizes[i];
    if (sizes[i] == 0) continue;
    Span span{};
    span.numel = sizes[i];
    span.offset = static_cast<uint64_t>(offsets[i]);
    span.stream = Stream(static_cast<uint64_t>(streams[i]));
    spans.push_back(span);
  }
  Tensor result = torch::stable::empty_like(seeds);
  auto* sums = static_cast<uint64_t*>(result.mutable_data_ptr());
  const bool signs = static_cast<Domain>(dist) == kRademacher;
  std::fill(sums, sums + count, signs ? static_cast<uint64_t>(total) << 20 : 0);
  if (signs) return result;  // every square is 1

  Terms terms{};
  terms.keys = keys.data();
  terms.count = count;
  const auto kernel = kernels_of(isa).squares;
  parallel(spans, 0, [&](const Span& piece, void*) {
    std::vector<uint64_t> part(count);
    kernel(terms, piece, part.data());
    for (int64_t k = 0; k < count; ++k) std::atomic_ref(sums[k]).fetch_add(part[k], std::memory_order_relaxed);
  });
  return result;
}

constexpr int64_t kSumTile = 4096;  // of check_project

void project_cpu(Tensor partial, TensorList tensors, Tensor seeds, std::vector<int64_t> streams,
                 std::vector<int64_t> offsets, int64_t dist, std::string isa) {
  check_project(partial, 1, tensors, seeds, streams, offsets, dist);
  const int64_t count = seeds.numel(), tiles = partial.size(1);
  if (count == 0 || tiles == 0) return;
  std::vector<PhiloxKey> keys;
  for (int64_t k = 0; k < count; ++k) keys.push_back(philox_key(data<uint64_t>(seeds)[k]));
  std::vector<Span> spans;
  std::vector<int64_t> starts;  // tiles before each span
  int64_t before = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Span span{};
    span.numel = tensors[i].numel();
    if (span.numel == 0) continue;
    span.in = tensors[i].const_data_ptr();
    span.offset = static_cast<uint64_t>(offsets[i]);
    span.stream = Stream(static_cast<uint64_t>(streams[i]));
    spans.push_back(span);
    starts.push_back(before);
    before += sum_tiles(span.offset, span.numel);
  }
  Terms terms{};
  terms.keys = keys.data();
  terms.count = count;
  terms.dist = static_cast<Domain>(dist);
  terms.dtype = dtype_of(tensors[0]);
  auto* sums = static_cast<double*>(partial.mutable_data_ptr());
  const auto kernel = kernels_of(isa).project;
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (kSumTile * count)),
                              [&](int64_t begin, int64_t end) {
    alignas(64) std::byte scratch[kScratchPerDirection];
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (i + 1 < static_cast<int64_t>(starts.size()) && starts[i + 1] <= tile) ++i;
      Span piece = spans[i];
      const int64_t lead = static_cast<int64_t>(piece.offset % kSumTile), first = (tile - starts[i]) * kSumTile - lead;
      piece.begin = std::max<int64_t>(first, 0);
      piece.end = std::min(first + kSumTile, piece.numel);
      kernel(terms, piece, scratch, sums + tile, tiles);
    }
  });
}

Tensor derive_seed_cpu(Tensor run_seed, Tensor step, Tensor k) {
  Tensor seeds = torch::stable::empty_like(run_seed);
  const auto *r = data<uint64_t>(run_seed), *s = data<uint64_t>(step), *j = data<uint64_t>(k);
  auto* out = static_cast<uint64_t*>(seeds.mutable_data_ptr());
  for (int64_t i = 0; i < run_seed.numel(); ++i) out[i] = derive_seed(r[i], s[i], static_cast<uint32_t>(j[i]));
  return seeds;
}

}  // namespace

STABLE_TORCH_LIBRARY(zokernels_cpu, m) {
  m.def(ZK_COMBINE_SCHEMA(", str isa"));
  m.def(ZK_FAN_OUT_SCHEMA(", str isa"));
  m.def(ZK_SPREAD_SCHEMA(", str isa"));
  m.def(ZK_UPDATE_SCHEMA(", str isa"));
  m.def(ZK_LOW_RANK_SCHEMA(", str isa"));
  m.def(ZK_REQUANTIZE_SCHEMA(", str isa"));
  m.def(ZK_SQUARES_SCHEMA(", str isa"));
  m.def(ZK_PROJECT_SCHEMA(", str isa"));
  m.def(ZK_ENCODE_SCHEMA(", str isa"));
  m.def(ZK_DECODE_SCHEMA(", str isa"));
  m.def(ZK_DECODE_FAN_OUT_SCHEMA(", str isa"));
  m.def(ZK_DERIVE_SEED_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(zokernels_cpu, CPU, m) {
  m.impl("combine", TORCH_BOX(&combine_cpu));
  m.impl("fan_out", TORCH_BOX(&fan_out_cpu));
  m.impl("spread", TORCH_BOX(&spread_cpu));
  m.impl("update", TORCH_BOX(&update_cpu));
  m.impl("low_rank", TORCH_BOX(&low_rank_cpu));
  m.impl("requantize", TORCH_BOX(&requantize_cpu));
  m.impl("squares", TORCH_BOX(&squares_cpu));
  m.impl("project", TORCH_BOX(&project_cpu));
  m.impl("encode", TORCH_BOX(&encode_cpu));
  m.impl("decode", TORCH_BOX(&decode_cpu));
  m.impl("decode_fan_out", TORCH_BOX(&decode_fan_out_cpu));
  m.impl("derive_seed", TORCH_BOX(&derive_seed_cpu));
}

}  // namespace zk::cpu
