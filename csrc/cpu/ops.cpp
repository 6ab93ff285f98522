// torch.ops.zokernels_cpu.*: unpacks tensors (stable ABI only) and spreads elements over torch's thread pool.
// Arguments were checked in zokernels/checks.py; the checks here guard memory against a direct call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../noise/rounding.h"
#include "../op_args.h"
#include "combine.h"
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
    default: STD_TORCH_CHECK(false, "zokernels_cpu::combine: expected float32, bfloat16 or float16 tensors");
  }
}

// combine where plus and minus are empty, else fan_out; `write`: whether theta is written.
void run(const std::vector<Tensor>& out, const std::vector<Tensor>& params, const std::vector<Tensor>& plus,
         const std::vector<Tensor>& minus, const std::vector<Direction>& directions, const std::vector<int64_t>& streams,
         const std::vector<int64_t>& offsets, int64_t dist, const std::optional<Tensor>& decay,
         const std::optional<Tensor>& rounding_seed, const std::string& isa) {
  Combine op{};
  op.directions = directions.data();
  op.fan_out = !plus.empty();
  op.count = static_cast<int64_t>(directions.size()) - (op.fan_out ? 1 : 0);
  op.dist = static_cast<Domain>(dist);
  op.dtype = dtype_of(params[0]);
  if (decay) op.decay = canonical_nan(*static_cast<const float*>(decay->const_data_ptr()));
  op.has_decay = decay && op.decay != 1.0f;
  op.stochastic = rounding_seed.has_value() && op.dtype != DType::f32;
  if (op.stochastic) {
    op.rounding = philox_key(static_cast<uint64_t>(*static_cast<const int64_t*>(rounding_seed->const_data_ptr())));
  }
  const bool writes = !op.fan_out || op.count > 0 || decay.has_value();

  std::vector<Span> spans;
  std::vector<int64_t> starts;  // elements before each span
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    if (n == 0) continue;
    spans.push_back({params[i].const_data_ptr(), writes ? out[i].mutable_data_ptr() : nullptr,
                     op.fan_out ? plus[i].mutable_data_ptr() : nullptr, op.fan_out ? minus[i].mutable_data_ptr() : nullptr,
                     static_cast<uint64_t>(offsets[i]), static_cast<uint32_t>(streams[i]), 0, n});
    starts.push_back(total);
    total += n;
  }

  const CombineSpan kernel = combine_span(isa);
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    const size_t scratch_size = op.dist == kRademacher ? directions.size() * kScratchPerDirection : 0;
    std::unique_ptr<std::byte[]> memory(new std::byte[scratch_size + 64]);
    void* scratch = memory.get();
    size_t space = scratch_size + 64;
    std::align(64, scratch_size, scratch, space);
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      Span piece = spans[i];
      const int64_t stop = std::min(end, starts[i] + piece.end);
      piece.begin = begin - starts[i];
      piece.end = stop - starts[i];
      kernel(op, piece, scratch);
      begin = stop;
    }
  });
}

void append(std::vector<Direction>& directions, const Tensor& seeds, const Tensor& coeffs) {
  const auto* seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  const auto* coeff = static_cast<const float*>(coeffs.const_data_ptr());
  for (int64_t k = 0; k < seeds.numel(); ++k) {
    directions.push_back({philox_key(static_cast<uint64_t>(seed[k])), canonical_nan(coeff[k])});
  }
}

void combine_cpu(std::vector<Tensor> out, std::vector<Tensor> params, Tensor seeds, Tensor coeffs,
                 std::vector<int64_t> streams, std::vector<int64_t> offsets, int64_t dist, std::optional<Tensor> decay,
                 std::optional<Tensor> rounding_seed, std::string isa) {
  check_combine_args({out}, params, seeds, coeffs, streams, offsets, dist);
  if (params.empty()) return;
  std::vector<Direction> directions;
  append(directions, seeds, coeffs);
  run(out, params, {}, {}, directions, streams, offsets, dist, decay, rounding_seed, isa);
}

void fan_out_cpu(std::vector<Tensor> params, std::vector<Tensor> plus, std::vector<Tensor> minus, Tensor seed, Tensor coeff,
                 Tensor seeds, Tensor coeffs, std::vector<int64_t> streams, std::vector<int64_t> offsets, int64_t dist,
                 std::optional<Tensor> decay, std::optional<Tensor> rounding_seed, std::string isa) {
  check_combine_args({plus, minus}, params, seeds, coeffs, streams, offsets, dist);
  check_one_direction(seed, coeff);
  if (params.empty()) return;
  std::vector<Direction> directions;
  append(directions, seeds, coeffs);
  append(directions, seed, coeff);
  run(params, params, plus, minus, directions, streams, offsets, dist, decay, rounding_seed, isa);
}

Tensor derive_seed_cpu(Tensor run_seed, Tensor step, Tensor k) {
  Tensor seeds = torch::stable::empty_like(run_seed);
  const auto* r = static_cast<const uint64_t*>(run_seed.const_data_ptr());
  const auto* s = static_cast<const uint64_t*>(step.const_data_ptr());
  const auto* j = static_cast<const uint64_t*>(k.const_data_ptr());
  auto* out = static_cast<uint64_t*>(seeds.mutable_data_ptr());
  for (int64_t i = 0; i < run_seed.numel(); ++i) out[i] = derive_seed(r[i], s[i], static_cast<uint32_t>(j[i]));
  return seeds;
}

}  // namespace

STABLE_TORCH_LIBRARY(zokernels_cpu, m) {
  m.def(ZK_COMBINE_SCHEMA(", str isa"));
  m.def(ZK_FAN_OUT_SCHEMA(", str isa"));
  m.def(ZK_DERIVE_SEED_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(zokernels_cpu, CPU, m) {
  m.impl("combine", TORCH_BOX(&combine_cpu));
  m.impl("fan_out", TORCH_BOX(&fan_out_cpu));
  m.impl("derive_seed", TORCH_BOX(&derive_seed_cpu));
}

}  // namespace zk::cpu
