// What the two tensor libraries share: the schemas of their entries, and the checks that keep a direct call in bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

// `extra`: further arguments of the backend, from the comma on.
#define ZK_COMBINE_SCHEMA(extra)                                                                               \
  "combine(Tensor(a!)[] out, Tensor[] params, Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, "     \
  "int dist, Tensor? decay, Tensor? rounding_seed" extra ") -> ()"
#define ZK_FAN_OUT_SCHEMA(extra)                                                                               \
  "fan_out(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor seed, Tensor coeff, "            \
  "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, int dist, Tensor? decay, Tensor? rounding_seed"  \
  extra ") -> ()"
#define ZK_DERIVE_SEED_SCHEMA "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor"

namespace zk {

// `written`: lists that go with params element by element.
inline void check_combine_args(const std::vector<std::vector<torch::stable::Tensor>>& written,
                               const std::vector<torch::stable::Tensor>& params, const torch::stable::Tensor& seeds,
                               const torch::stable::Tensor& coeffs, const std::vector<int64_t>& streams,
                               const std::vector<int64_t>& offsets, int64_t dist) {
  STD_TORCH_CHECK(streams.size() == params.size() && offsets.size() == params.size(),
                  "combine: params, streams, offsets: expected equal lengths");
  STD_TORCH_CHECK(seeds.numel() == coeffs.numel(), "combine: seeds, coeffs: expected equal lengths");
  STD_TORCH_CHECK(dist == 1 || dist == 2, "combine: dist: expected 1 (normal) or 2 (rademacher), got ", dist);
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(params[i].is_contiguous() && params[i].scalar_type() == params[0].scalar_type(),
                    "combine: params: expected contiguous tensors of one dtype; not so at ", i);
  }
  for (const auto& list : written) {
    STD_TORCH_CHECK(list.size() == params.size(), "combine: expected as many tensors to write as params");
    for (size_t i = 0; i < params.size(); ++i) {
      STD_TORCH_CHECK(list[i].is_contiguous() && list[i].scalar_type() == params[0].scalar_type() &&
                          list[i].numel() == params[i].numel(),
                      "combine: expected contiguous tensors to write, like params; not so at ", i);
    }
  }
}

inline void check_one_direction(const torch::stable::Tensor& seed, const torch::stable::Tensor& coeff) {
  STD_TORCH_CHECK(seed.numel() == 1 && coeff.numel() == 1, "fan_out: seed, coeff: expected one value each");
}

}  // namespace zk
