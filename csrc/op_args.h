// What the two tensor libraries share: the schemas of their entries, and the checks that keep a direct call in bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

// `extra`: further arguments of the backend, from the comma on.
#define ZK_COMBINE_SCHEMA(extra)                                                                               \
  "combine(Tensor(a!)[] out, Tensor[] params, Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, "     \
  "int dist, Tensor? decay, Tensor? rounding_seed" extra ") -> ()"
#define ZK_DERIVE_SEED_SCHEMA "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor"

namespace zk {

inline void check_combine_args(const std::vector<torch::stable::Tensor>& out,
                               const std::vector<torch::stable::Tensor>& params, const torch::stable::Tensor& seeds,
                               const torch::stable::Tensor& coeffs, const std::vector<int64_t>& streams,
                               const std::vector<int64_t>& offsets, int64_t dist) {
  STD_TORCH_CHECK(out.size() == params.size() && streams.size() == params.size() && offsets.size() == params.size(),
                  "combine: out, params, streams, offsets: expected equal lengths");
  STD_TORCH_CHECK(seeds.numel() == coeffs.numel(), "combine: seeds, coeffs: expected equal lengths");
  STD_TORCH_CHECK(dist == 1 || dist == 2, "combine: dist: expected 1 (normal) or 2 (rademacher), got ", dist);
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(out[i].numel() == params[i].numel() && out[i].scalar_type() == params[i].scalar_type() &&
                        params[i].scalar_type() == params[0].scalar_type() && out[i].is_contiguous() &&
                        params[i].is_contiguous(),
                    "combine: expected contiguous tensors of one dtype, out[i] as long as params[i]; not so at i = ", i);
  }
}

}  // namespace zk
